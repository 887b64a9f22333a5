"""A real proxy with one simulated prefill and decode behind it, in this process, to be treated badly.

What must hold whatever is done to it: engines idle, alive and without KV left over; the right answer to a plain
request; no error in the log, no failure in a task; memory within a bound.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from disagg_sim import expected_text
from disagg_sim.chaos.machine import Machine, running_machine
from fuzz.pure import Report, Witness

GROWTH_MIB = 96
"""MiB that the process (proxy, engines and clients together) may grow after the first quarter of a run."""

_QUIET = 8.0
"""Seconds within which all work must end."""

_PLAIN = {"model": "sim-model", "prompt": "San Francisco is a", "max_tokens": 4}
_RIGHT = expected_text(_PLAIN["prompt"], 4)


class Harm(AssertionError):
    """Something that must hold does not."""


class Live:
    """The machine and what is watched on it."""

    def __init__(self, machine: Machine, session: aiohttp.ClientSession) -> None:
        self.machine = machine
        self.session = session
        self.failures: list[str] = []
        self.peer_view = Witness(self.failures)
        logging.getLogger().addHandler(self.peer_view)
        asyncio.get_running_loop().set_exception_handler(self._failed)

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the HTTP side."""
        host, port = self.machine.socket.getsockname()[:2]
        return host, port

    async def check_serves(self) -> None:
        """A plain request gets its right answer."""
        async with self.session.post(self.machine.url + "/v1/completions", json=_PLAIN) as answer:
            body = await answer.json()
            if answer.status != 200 or body["choices"][0]["text"] != _RIGHT:
                raise Harm(f"a plain request got {answer.status} {body}")

    async def check_unharmed(self) -> None:
        """All work ends, and nothing is left or broken."""
        if busy := await self.machine.until_idle(_QUIET):
            raise Harm(f"not at rest: {busy}")
        for engine in self.machine.engines:
            state = engine.state()
            if state["dead"] or state["listener"] != "alive" or state["stalled_on"] or state["kv_waiting"]:
                raise Harm(f"{engine.name} is harmed: {state}")
        if self.failures:
            raise Harm(f"failed: {self.failures}")

    async def check(self) -> None:
        """Everything."""
        await self.check_unharmed()
        await self.check_serves()

    def close(self) -> None:
        """Stop watching."""
        logging.getLogger().removeHandler(self.peer_view)
        asyncio.get_running_loop().set_exception_handler(None)


@asynccontextmanager
async def running(settings: dict[str, Any], **knobs: Any) -> AsyncIterator[Live]:
    """A machine that is ready; everything ends with the block."""
    fast = {"prefill_tokens_per_second": 0.0, "time_per_output_token": 0.0005, "startup_seconds": 0.0}
    async with running_machine(1, 1, settings, {**fast, **knobs}) as machine, aiohttp.ClientSession() as session:
        live = Live(machine, session)
        try:
            yield live
        finally:
            live.close()


def rss_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


class Pace:
    """Time, number and memory of one run.

    Args:
        seconds, rounds: whichever is over first ends the run; 0 for no bound.
    """

    def __init__(self, report: Report, seconds: float, rounds: int) -> None:
        self._report = report
        self._seconds = seconds
        self._rounds = rounds
        self._begun = time.monotonic()
        self._done = 0
        self._warm: float | None = None

    def goes_on(self) -> bool:
        """Whether there is another round."""
        passed = time.monotonic() - self._begun
        share = max(
            passed / self._seconds if self._seconds else 0.0, self._done / self._rounds if self._rounds else 0.0
        )
        if share >= 0.25 and self._warm is None:
            self._warm = rss_mib()
        self._done += 1
        self._report.seconds = passed
        return share < 1.0

    def end(self) -> None:
        """Note the memory, and judge it."""
        self._report.seconds = time.monotonic() - self._begun
        warm, now = self._warm or rss_mib(), rss_mib()
        self._report.more.update(rss_mib_after_a_quarter=round(warm, 1), rss_mib=round(now, 1))
        if now - warm > GROWTH_MIB:
            self._report.findings.append(f"memory grew from {warm:.0f} to {now:.0f} MiB")


async def judge(report: Report, what: str, check: Callable[[], Any]) -> bool:
    """Run a check; a failure becomes a finding. Whether it held."""
    try:
        await check()
    except (Harm, AssertionError, aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        report.findings.append(f"{type(error).__name__}: {error}; after {what}"[:20_000])
        return False
    return True
