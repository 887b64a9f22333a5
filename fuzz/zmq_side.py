"""The live registration port: hostile frames and bytes, floods of identities, forged registrations, stolen identities.

Meanwhile a client asks plain requests all the time. Holds: each gets its right answer; the two live instances are never
taken out; the listener's thread lives and has failed at no message; what is remembered of strangers is bounded; and
all of :mod:`fuzz.live`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from disagg_proxy.cluster.instance import State
from disagg_proxy.cluster.registry import MAX_INSTANCES
from fuzz.live import Harm, Live, Pace, judge, running
from fuzz.pure import Report
from fuzz.zmq_attacks import Engine, attack, begin

_SETTINGS = {"instance_expiry": 5.0}
"""Ten of the instances' pings; a run must be longer to notice that none arrives."""
_REMEMBERED = 4096
"""Bound on each collection that strangers can fill."""


async def run(seed: int, *, seconds: float = 0.0, rounds: int = 0) -> Report:
    """Rounds of attacks until the time or their number is over; the first finding ends it."""
    report = Report("zmq_side", "seeded", seed)
    async with running(_SETTINGS) as live:
        pace = Pace(report, seconds, rounds)
        engines = [Engine("PD"[not e.config.is_producer], e.http_address, e.kv_address) for e in live.machine.engines]
        known = {engine.http for engine in engines}
        start = (live.machine.services.discovery.listener.port, engines, seed)
        strangers = ProcessPoolExecutor(1, get_context("spawn"), begin, start)
        asking = asyncio.create_task(_ask(live, report))
        try:
            for number in itertools.count(1):
                if not pace.goes_on() or report.findings or asking.done():
                    break
                name, sent = await asyncio.get_running_loop().run_in_executor(strangers, attack)
                report.executions += sent
                report.labels[name] += sent
                await judge(report, f"round {number}, {name}", lambda: _look(live, known))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        finally:
            strangers.shutdown()
        if not report.findings:
            await judge(report, "the last round", live.check)
        traffic = live.machine.services.discovery.listener.traffic
        report.more.update(messages_read=traffic.messages, dropped=dict(traffic.dropped))
        report.more["refused"] = sum(live.machine.services.discovery.refused.values())
        report.more["instances_known"] = len(live.machine.services.registry.instances())
        pace.end()
    return report


async def _ask(live: Live, report: Report) -> None:
    """Plain requests, one after the other."""
    while not report.findings:
        if not await judge(report, "a plain request during the attacks", live.check_serves):
            return
        report.labels["plain requests answered"] += 1
        await asyncio.sleep(0.01)


async def _look(live: Live, known: set[str]) -> None:
    services = live.machine.services
    listener = services.discovery.listener
    if not listener._thread.is_alive():
        raise Harm("the listener's thread is dead")
    if "failed" in listener.traffic.dropped:
        raise Harm("the listener failed at a message")
    for instance in services.registry.instances():
        if instance.http.text in known and (instance.state is not State.READY or instance.times_lost):
            raise Harm(f"{instance} is {instance.state.value}: {instance.reason}")
    for name, size in _sizes(live):
        if size > _REMEMBERED:
            raise Harm(f"{size} {name} are remembered")


def _sizes(live: Live) -> Iterator[tuple[str, int]]:
    services = live.machine.services
    discovery = services.discovery
    yield "instances", len(services.registry.instances()) * _REMEMBERED // MAX_INSTANCES
    yield "refused endpoints", len(discovery.refused)
    yield "waiting announcements", len(discovery.mailbox)
    yield "blamed senders", len(discovery.listener._warned)
    yield "tasks", len(asyncio.all_tasks())
