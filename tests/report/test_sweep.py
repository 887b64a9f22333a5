"""One setup from its warm-up to its last rate, with a load generator that makes up what it measured."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from disagg_report.arrivals import Workload
from disagg_report.client import ClientFailed, Watch
from disagg_report.folder import read_report, setup_folder, write_header
from disagg_report.open_loop import OpenLoopClient
from disagg_report.power import PowerMeter
from disagg_report.progress import Progress
from disagg_report.rates import Ended
from disagg_report.records import Measurement, Power, Shot
from disagg_report.sweep import Plan, Sweep
from tests.report.make import SLO, header, measured, setup, shot


class MadeUp:
    """Everything up to ``limit`` requests/s is within the SLO."""

    name = "made up"

    def __init__(self, limit: float, at: Callable[[float], None] = lambda rate: None) -> None:
        self._limit = limit
        self._at = at

    def window(self) -> tuple[float, float] | None:
        return (1.0, 2.0)

    async def measure(self, rate: float, stop: asyncio.Event, watch: Watch) -> Measurement:
        self._at(rate)
        one = measured(rate, 100) if rate <= self._limit else measured(rate, 10, 90)
        return replace(one, interrupted=stop.is_set())


class Warm(OpenLoopClient):
    """Warm-ups that end as they are told to."""

    def __init__(self, shots: Sequence[Shot]) -> None:
        self._shots = shots

    async def warm_up(self, count: int) -> Sequence[Shot]:
        return self._shots


class Meter(PowerMeter):
    """Power of one GPU."""

    def __init__(self) -> None:
        self.windows: list[tuple[float, float] | None] = []

    def start(self) -> None:
        pass

    def stop(self, window: tuple[float, float] | None = None) -> dict[str, Power]:
        self.windows.append(window)
        return {"prefill": Power(("0",), 100.0, 100.0, 1.0)}


class Run:
    """A report with one setup, and its sweep."""

    def __init__(self, folder: Path, client: MadeUp, rates: Sequence[float] = (), time_limit: float = 600.0,
                 warm: Sequence[Shot] = (shot(),), meter: Meter | None = None) -> None:  # fmt: skip
        self.folder = folder
        self.out = io.StringIO()
        self.stop = asyncio.Event()
        write_header(folder, header())
        plan = Plan(Workload("m", 8, 5, 1.0, 1), SLO, rates, time_limit, 4)
        self._sweep = Sweep(
            setup("pd", "1 prefill + 1 decode", ended=""), setup_folder(folder, "pd"), plan, client, Warm(warm), meter,
            Progress(self.out), self.stop,
        )  # fmt: skip

    async def __call__(self) -> Ended:
        return await self._sweep.run()

    def rates(self) -> list[float]:
        return [one.rate for one in read_report(self.folder).setups[0].rates]

    def ended(self) -> str:
        return read_report(self.folder).setups[0].setup.ended


async def test_it_finds_the_limit_and_reports_each_rate(tmp_path: Path) -> None:
    meter = Meter()
    run = Run(tmp_path, MadeUp(10), meter=meter)
    assert await run() is Ended.FOUND
    assert run.rates() == [1, 2, 4, 8, 9.4, 11, 16] and run.ended() == "the limit was found"
    lines = run.out.getvalue().splitlines()
    assert "16 requests/s: TTFT p50 500 ms, p99 500 ms;" in next(line for line in lines if line.endswith(": NOT kept"))
    assert meter.windows == [(1.0, 2.0)] * 7
    assert read_report(tmp_path).setups[0].rates[0].power["prefill"].watts == 100


async def test_a_list_of_rates(tmp_path: Path) -> None:
    run = Run(tmp_path, MadeUp(1), rates=[8, 4], time_limit=0)
    assert await run() is Ended.LIST
    assert run.rates() == [4, 8]


async def test_no_rate_begins_when_the_time_is_over(tmp_path: Path) -> None:
    run = Run(tmp_path, MadeUp(1e9), time_limit=-1)
    assert await run() is Ended.TIME
    assert run.rates() == [] and "time limit expired" in run.ended()


async def test_interrupted_it_keeps_the_rates_before(tmp_path: Path) -> None:
    def at(rate: float) -> None:
        if rate == 4:
            run.stop.set()

    run = Run(tmp_path, MadeUp(10, at))
    assert await run() is Ended.INTERRUPTED
    assert run.rates() == [1, 2, 4] and run.ended() == "it was interrupted"
    assert [one.interrupted for one in read_report(tmp_path).setups[0].rates] == [False, False, True]


async def test_interrupted_in_the_warm_up(tmp_path: Path) -> None:
    run = Run(tmp_path, MadeUp(10))
    run.stop.set()
    assert await run() is Ended.INTERRUPTED
    assert run.rates() == []


async def test_nothing_answers_the_warm_up(tmp_path: Path) -> None:
    run = Run(tmp_path, MadeUp(10), warm=[Shot(error="HTTP 401: no key")])
    with pytest.raises(ClientFailed, match="HTTP 401: no key"):
        await run()
    assert run.ended() == "the load generator failed"


async def test_a_load_generator_that_fails_leaves_what_was_measured(tmp_path: Path) -> None:
    def at(rate: float) -> None:
        if rate == 4:
            raise ClientFailed("broken")

    run = Run(tmp_path, MadeUp(10, at), meter=Meter())
    with pytest.raises(ClientFailed, match="broken"):
        await run()
    assert run.rates() == [1, 2] and run.ended() == "the load generator failed"
