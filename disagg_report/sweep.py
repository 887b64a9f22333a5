"""Sweep of one setup: warm-up, then one rate after the other; each is written when it is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from disagg_report.arrivals import Workload
from disagg_report.client import Client, ClientFailed
from disagg_report.figures import Figures, figures, percentile, saturated
from disagg_report.folder import Setup, write_rate, write_setup
from disagg_report.open_loop import OpenLoopClient
from disagg_report.placed import between
from disagg_report.power import PowerMeter
from disagg_report.progress import Progress
from disagg_report.rates import Ended, Tried, next_rate
from disagg_report.records import Measurement
from disagg_report.slo import Slo


@dataclass(frozen=True, slots=True)
class Plan:
    """How a setup is measured.

    Attributes:
        rates: rates to try, in order; empty: chosen by ``rates.py``.
        time_limit: seconds after which no further rate starts; ignored for listed rates.
        warm_up: number of requests before the first rate.
    """

    workload: Workload
    slo: Slo
    rates: Sequence[float]
    time_limit: float
    warm_up: int


class Sweep:
    """Measures one setup into its folder.

    Args:
        stop: set by the user's Ctrl+C.
        placed: reads where the proxy has placed requests so far; None where it does not choose.
    """

    def __init__(self, setup: Setup, folder: Path, plan: Plan, client: Client, warmer: OpenLoopClient,
                 meter: PowerMeter | None, progress: Progress, stop: asyncio.Event,
                 placed: Callable[[], Awaitable[dict[str, int]]] | None = None) -> None:  # fmt: skip
        self._setup = setup
        self._folder = folder
        self._plan = plan
        self._client = client
        self._warmer = warmer
        self._meter = meter
        self._progress = progress
        self._stop = stop
        self._placed = placed
        self._tried: list[Tried] = []
        self._quiet_ms: float | None = None

    async def run(self) -> Ended:
        """Measure every rate and return why the sweep ended.

        Raises:
            ClientFailed: no request of the warm-up was answered, or the load generator failed.
        """
        write_setup(self._folder, self._setup)
        self._progress.say(f"{self._setup.title}: {self._plan.warm_up} requests to warm up, then {self._plan.slo}")
        ended = Ended.FAILED
        try:
            await self._warm_up()
            ended = await self._rates()
            return ended
        finally:
            write_setup(self._folder, replace(self._setup, ended=ended.value))

    async def _warm_up(self) -> None:
        warm = asyncio.create_task(self._warmer.warm_up(self._plan.warm_up))
        halt = asyncio.create_task(self._stop.wait())
        await asyncio.wait([warm, halt], return_when=asyncio.FIRST_COMPLETED)
        halt.cancel()
        if not warm.done():
            warm.cancel()
            await asyncio.gather(warm, return_exceptions=True)
            return
        failed = [shot for shot in warm.result() if not shot.answered]
        if len(failed) == len(warm.result()):
            raise ClientFailed(f"no request of the warm-up was answered: {failed[0].error}")

    async def _rates(self) -> Ended:
        begin = time.monotonic()
        slowest = 0.0
        while not self._stop.is_set():
            rate = next_rate(self._tried, self._plan.rates)
            if isinstance(rate, Ended):
                return rate
            if not self._plan.rates and time.monotonic() - begin + slowest > self._plan.time_limit:
                return Ended.TIME
            started = time.monotonic()
            await self._rate(rate)
            slowest = max(slowest, time.monotonic() - started)
        return Ended.INTERRUPTED

    async def _rate(self, rate: float) -> None:
        self._progress.begin(f"{self._setup.title}, {rate:g} requests/s", self._plan.workload.seconds)
        before = await self._placed() if self._placed else {}
        if self._meter:
            self._meter.start()
        try:
            measured = await self._client.measure(rate, self._stop, self._progress.update)
        finally:
            power = self._meter.stop(self._client.window()) if self._meter else {}
        if not any(shot.answered for shot in measured.shots) and measured.interrupted:
            return
        placed = between(before, await self._placed()) if self._placed else {}
        measured = replace(measured, power=power, placed=placed)
        write_rate(self._folder, measured)
        found = figures(measured, self._plan.slo)
        behind = self._saturates(measured)
        if not measured.interrupted:
            self._tried.append(Tried(rate, found.kept and not behind))
        self._progress.say(line(self._setup.title, found, behind))

    def _saturates(self, measured: Measurement) -> bool:
        if self._quiet_ms is None or measured.rate < min(one.rate for one in self._tried):
            latencies = [shot.latency_ms for shot in measured.shots if shot.answered and shot.latency_ms is not None]
            self._quiet_ms = percentile(latencies, 0.5)
        return saturated(measured, self._quiet_ms)


def line(title: str, found: Figures, behind: bool) -> str:
    """Summarise one rate in one line."""
    ttft, itl = found.ttft_ms, found.itl_ms
    times = "" if ttft[0] is None else f"TTFT p50 {ttft[0]:.0f} ms, p99 {ttft[1]:.0f} ms; "
    times += "" if itl[0] is None else f"inter-token p50 {itl[0]:.1f} ms, p99 {itl[1]:.1f} ms; "
    words = "cut short" if found.interrupted else "kept" if found.kept else "NOT kept"
    words += ", responses fall behind arrivals" if behind else ""
    return (
        f"{title}, {found.rate:g} requests/s: {times}{found.good} of {found.sent} within the SLO"
        f" = {found.goodput:.2f} good requests/s: {words}"
    )
