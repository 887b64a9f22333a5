"""One run: load and faults by the plan, then a wait until all work has ended, then an inspection for leaks."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from disagg_proxy.cluster.instance import State
from disagg_sim.chaos.clients import CUT, REFUSED, RIGHT, Clients, Result
from disagg_sim.chaos.engines import key_of
from disagg_sim.chaos.machine import LEG_TIMEOUT, Machine, running_machine
from disagg_sim.chaos.plan import ALL, LEAVE, Plan, PlannedRequest, make_plan
from disagg_sim.chaos.report import Report
from disagg_sim.chaos.trouble import TroubleMaker
from disagg_sim.chaos.work import make_work

DEADLINE = 4 * LEG_TIMEOUT
"""Seconds for a client's response or error: the deadlines of both legs, and the same for retries and bodies."""

_AFTER_EFFECT = 6.0
"""Seconds after a fault in which failures still count as its consequence: circuit breakers, probes, restarts."""

_WEDGED_TURNS = 4
"""Rounds of requests within which a decode that receives no KV must be detected."""

_QUIET = 3 * LEG_TIMEOUT
"""Seconds for all work to end: an abandoned prefill has twice its deadline."""


@dataclass(frozen=True)
class Options:
    """What to run; see ``python -m disagg_sim.chaos --help``."""

    seconds: float = 30.0
    seed: int = 1
    prefills: int = 3
    decodes: int = 3
    rate: float = 20.0
    trouble: Sequence[str] = ALL
    every: float = 3.0
    supervisor: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)

    def plan(self) -> Plan:
        """The plan for these options."""
        return make_plan(
            self.seed,
            seconds=self.seconds,
            rate=self.rate,
            kinds=self.trouble,
            prefills=self.prefills,
            decodes=self.decodes,
            every=self.every,
        )


async def run(options: Options) -> Report:
    """Execute the plan and report.

    Raises:
        RuntimeError: the machine does not start.
    """
    plan = options.plan()
    report = Report(asdict(options), planned=len(plan.requests))
    async with running_machine(options.prefills, options.decodes, options.settings, options.knobs) as machine:
        warm = Clients(machine.url, DEADLINE)
        pairs = options.prefills * options.decodes
        await _plain(warm, options.seed, pairs)
        tasks, memory = len(asyncio.all_tasks()), _rss_mib()
        visitors = Clients(machine.url, DEADLINE)
        maker = TroubleMaker(machine, visitors.now, supervised=options.supervisor)
        supervisor = asyncio.ensure_future(machine.supervise() if options.supervisor else asyncio.sleep(0))
        await execute(plan, visitors, maker)
        report.seconds = visitors.now()
        report.busy = await machine.until_idle(_QUIET)
        if not await machine.until_ready(15):
            report.not_ready = _not_ready(machine, pairs)
        last = Clients(machine.url, DEADLINE)
        await _detect_wedged(machine, warm, options.seed)
        right = await _plain(last, options.seed + 1, 2 * pairs)
        report.afterwards = (2 * pairs, right)
        report.afterwards_causes.update(one.cause for one in last.results if one.outcome != RIGHT)
        await machine.until_idle(_QUIET if not report.busy else 0)
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
        for one in (warm, visitors, last):
            one.close()
        report.take(visitors.results)
        report.tasks = (tasks, len(asyncio.all_tasks()))
        report.rss_mib = (memory, _rss_mib())
        _failures(report, visitors.results, maker, [kind for kind in options.trouble if kind != LEAVE])
        _inspect(report, machine, maker)
    return report


async def execute(plan: Plan, visitors: Clients, maker: TroubleMaker) -> None:
    """Send the requests and inject the faults of ``plan`` at their times; returns when all have ended."""

    async def at(time: float, work: Coroutine[Any, Any, Any]) -> None:
        try:
            await asyncio.sleep(time - visitors.now())
        except BaseException:
            work.close()
            raise
        await work

    async def clients() -> None:
        # Tasks are created at the time of their request, so a long plan does not create thousands of sleeping tasks.
        running: set[asyncio.Task[Result]] = set()
        for planned in plan.requests:
            await asyncio.sleep(planned.at - visitors.now())
            task = asyncio.ensure_future(visitors.visit(planned))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)

    await asyncio.gather(clients(), *(at(trouble.at, maker.make(trouble)) for trouble in plan.troubles))


async def _detect_wedged(machine: Machine, clients: Clients, seed: int) -> None:
    """Send requests until a decode that receives no KV is detected, if the run ended before."""
    for turn in range(_WEDGED_TURNS):
        if not machine.ledger.wedged:
            return
        await _plain(clients, seed + 2 + turn, 2 * len(machine.slots))
        await machine.until_idle(_QUIET)
        await machine.until_ready(15)


async def _plain(clients: Clients, seed: int, count: int) -> int:
    """Send ``count`` requests at once without disconnects, and return how many had the right response."""
    dice = random.Random(f"{seed} plain")
    works = [make_work(dice, number) for number in range(count)]
    results = await asyncio.gather(*(clients.visit(PlannedRequest(n, 0.0, w, None)) for n, w in enumerate(works)))
    return sum(result.outcome == RIGHT for result in results)


def _failures(report: Report, results: list[Result], maker: TroubleMaker, kinds: Sequence[str]) -> None:
    report.troubles = maker.done
    report.prefills_restarted = maker.prefills_restarted
    for result in results:
        if result.outcome not in (REFUSED, CUT):
            continue
        ended = result.begun + result.seconds
        near = (w for w in maker.windows if w.begun <= ended and result.begun <= w.ended + _AFTER_EFFECT)
        if next(near, None) is None:
            report.unexplained_failures.append(f"request {result.number} at {result.begun:.1f} s: {result.cause}")


def _inspect(report: Report, machine: Machine, maker: TroubleMaker) -> None:
    ledger, stats = machine.ledger, machine.services.stats
    report.decoded_twice = ledger.twice
    report.injected, report.prefills_repeated = ledger.injected, ledger.prefills_repeated
    frozen = maker.orphaned_prefills | ledger.wedged
    deaths = list(ledger.deaths)
    for engine in machine.engines:
        state = engine.state()
        sender = state["sender"] or {}
        if state["dead"] or state["listener"] != "alive":
            deaths.append((engine.kv_address, f"{engine.name}: {state['dead'] or state['listener']}"))
        elif state["stalled_on"] or sender:
            known = sender.get("to") in frozen
            stalled = f"{engine.name} on {state['stalled_on']}" + (f", sending to {sender['to']}" if sender else "")
            (report.stalled_explained if known else report.stalled).append(stalled)
        for request_id, size in state["kv_waiting"].items():
            report.orphans[f"{request_id} on {engine.name}"] = ledger.excused.get(key_of(request_id), "")
            report.orphan_bytes += size
        report.buffer_bytes += state["kv_buffer_used"]
        leak = state["kv_buffer_used"] - sum(state["kv_waiting"].values())
        if leak > 0 and not state["dead"] and engine.kv_address not in ledger.repeated_to:
            report.buffer_leaks.append(f"{engine.name}: {leak} bytes counted without KV")
    for address, what in deaths:
        (report.stalled_explained if address in maker.orphaned_prefills else report.dead).append(what)
    drains = stats.kv_releases
    report.proxy = {
        **{f"outcome {name}": count for name, count in stats.outcomes.items()},
        "drains done": drains.done,
        "drains failed": drains.failed,
        "failovers": stats.failovers,
        "freezes": sum(i.freezes for i in machine.services.registry.instances()),
        "replays": sum(i.replays for i in machine.services.registry.instances()),
        **{f"frozen {role} restarted": count for role, count in machine.frozen_restarted.items()},
    }


def _not_ready(machine: Machine, wanted: int) -> list[str]:
    known = machine.services.registry.instances()
    missing = [f"{i} is {i.state.value}: {i.reason}" for i in known if i.state is not State.READY]
    return [f"{machine.services.selection.ready_pairs()} of {wanted} pairs are ready", *missing]


def _rss_mib() -> float:
    """Resident memory of this process in MiB; 0 without /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0
