"""``disagg-proxy demo``: the proxy with simulated engines in one process, a load, and a prefill that freezes and heals.

Everything is of a chaos run: engines, requests with known answers, faults. Nothing is written, and the ports are the
kernel's choice. Exit codes: 0 also after SIGINT or SIGTERM, 1 a wrong or failed answer, or no start, 2 invalid option.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from collections import Counter
from collections.abc import Callable, Sequence

from disagg_power.book import ROLES
from disagg_proxy.cluster.instance import Instance, State
from disagg_sim.chaos.clients import RIGHT, Clients
from disagg_sim.chaos.machine import FREEZE_AFTER, Machine, running_machine
from disagg_sim.chaos.plan import Plan, Trouble, make_plan
from disagg_sim.chaos.run import DEADLINE, execute
from disagg_sim.chaos.trouble import TroubleMaker

_SECONDS = 60.0
_RATE = 10.0
"""Requests per second."""

_FREEZE_AT, _FREEZE_FOR = 0.3, 0.25
"""Beginning and duration of the freeze as shares of the run."""

_REPORTS = 6
"""Lines of progress in a run."""

_ENGINES = {"connector": "disagg_kv", "time_per_output_token": 0.02, "gpu": 0}


class _AnnouncedTrouble(TroubleMaker):
    """Says when the one fault begins and ends."""

    def __init__(self, machine: Machine, now: Callable[[], float], say: Callable[[str], None]) -> None:
        super().__init__(machine, now, supervised=False)
        self._victim = machine.prefills[0].engine.name
        self._say = say

    async def make(self, trouble: Trouble) -> None:
        self._say(f"{self._victim} stops computing; its /health still answers 200, and its pings go on")
        await super().make(trouble)
        self._say(f"{self._victim} computes again")


class _Demo:
    """Says what happens, with the seconds since the load began."""

    def __init__(self, machine: Machine, seconds: float) -> None:
        self._machine = machine
        self._seconds = seconds
        self._clients = Clients(machine.url, DEADLINE)
        self._states = {i: i.state for i in machine.services.registry.instances()}
        machine.services.registry.watch(changed=self._on_change)

    async def run(self) -> bool:
        """Returns whether every answer was right."""
        seconds = self._seconds
        freeze = Trouble(_FREEZE_AT * seconds, "freeze", "prefill", 0, _FREEZE_FOR * seconds, 1, 500, 1)
        planned = make_plan(1, seconds=seconds, rate=_RATE, kinds=(), prefills=2, decodes=2).requests
        plan = Plan(tuple(request for request in planned if request.work.status == 200), (freeze,))
        maker = _AnnouncedTrouble(self._machine, self._clients.now, self._say)
        loop = asyncio.get_running_loop()
        timers = [loop.call_later(seconds * at / _REPORTS, self._report) for at in range(1, _REPORTS)]
        self._say(f"load: {_RATE:g} requests/s of all routes, each answer is compared with the right one")
        try:
            await execute(plan, self._clients, maker)
        finally:
            for timer in timers:
                timer.cancel()
            self._clients.close()
            self._report()
            self._report_energy()
        return all(result.outcome == RIGHT for result in self._clients.results)

    def _on_change(self, instance: Instance) -> None:
        before, now = self._states.get(instance), instance.state
        self._states[instance] = now
        if now is before:
            return
        if now is State.READY:
            self._say(f"the proxy sends requests to {instance} again")
        elif now is State.FROZEN:
            self._say(f"the proxy moves its requests elsewhere: {instance} is {instance.reason}")

    def _report(self) -> None:
        results = self._clients.results
        outcomes = Counter(result.outcome for result in results)
        right = outcomes.pop(RIGHT, 0)
        others = "".join(f", {count} {outcome}" for outcome, count in outcomes.items()) or ", none failed"
        slowest = max((result.seconds for result in results), default=0.0)
        pairs = self._machine.services.selection.ready_pairs()
        self._say(f"{right} answers right{others}; the slowest took {slowest:.1f} s; {pairs} of 4 pairs are ready")

    def _report_energy(self) -> None:
        book = self._machine.services.energy
        costs = [(role, figures.joules_per_token) for role in ROLES if (figures := book.figures(role)) is not None]
        joules, _, _ = book.per_request()
        if joules and all(cost is not None for _, cost in costs):
            tokens = ", ".join(f"{role} {cost:.3g} J" for role, cost in costs)
            self._say(f"energy of the SIMULATED GPUs per token: {tokens}; {3600 / joules:.3g} requests/Wh")

    def _say(self, what: str) -> None:
        print(f"{self._clients.now():5.1f} s  {what}", flush=True)


async def _run(seconds: float) -> bool:
    stall = min(FREEZE_AFTER, seconds / 20)
    settings = {"log_level": "error", "freeze_after_min": stall, "freeze_after_max": stall}
    async with running_machine(2, 2, settings, _ENGINES) as machine:
        print(f"Proxy with 2 simulated prefill and 2 simulated decode engines: {machine.url}/v1", flush=True)
        print(f"The live page: {machine.url}/   It ends in {seconds:g} s; Ctrl+C ends it now.", flush=True)
        return await _Demo(machine, seconds).run()


async def _until_signal(seconds: float) -> int:
    demo = asyncio.ensure_future(_run(seconds))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, demo.cancel)
    try:
        right = await demo
    except asyncio.CancelledError:
        print("Stopped. Nothing is left behind.", flush=True)
        return 0
    except (RuntimeError, OSError) as error:
        print(f"The demo does not start: {error}", flush=True)
        return 1
    print("Done. Nothing is left behind.", flush=True)
    return 0 if right else 1


def _duration(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 3600:
        raise argparse.ArgumentTypeError("must be between 1 and 3600")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run once; see the module for the exit codes."""
    parser = argparse.ArgumentParser(
        prog="disagg-proxy demo",
        description="The proxy with two simulated prefill and two simulated decode engines: a load, a prefill that "
        "freezes while it still looks healthy, and its return. Prints the address of the live page. Needs no GPU, "
        "stops after --seconds, and leaves no process or file.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds", type=_duration, default=_SECONDS, help="duration of the load (default: %(default)g)"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.CRITICAL)
    return asyncio.run(_until_signal(args.seconds))
