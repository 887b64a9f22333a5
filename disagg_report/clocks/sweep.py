"""Runs a sweep over clocks: sets them through a guard, loads the server, measures, and writes each run as it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from disagg_power.clock_values import evenly
from disagg_power.devices import Devices, PowerError
from disagg_power.lease import Lease
from disagg_report.client import Client
from disagg_report.clocks import runs
from disagg_report.clocks.choice import chosen_clocks
from disagg_report.clocks.gpus import GpuWatch
from disagg_report.clocks.runs import Result, Run
from disagg_report.figures import figures
from disagg_report.progress import Progress
from disagg_report.records import Measurement
from disagg_report.slo import Slo

SAMPLE_SECONDS = 0.1
BEAT_SECONDS = 1.0
QUIET_RATES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
"""Tried one after the other at default clocks, where no rate is given."""
SHARE_OF_CAPACITY = 0.6


@dataclass(frozen=True, slots=True)
class ClockPlan:
    """How a setup is swept.

    Attributes:
        roles: GPUs by role.
        clocks: how many clocks of each role.
        rate: requests per second; 0: some share of what default clocks serve within the SLO.
        settle: seconds from setting clocks to the measurement.
        together: all roles at the same clock.
    """

    roles: Mapping[str, Sequence[str]]
    clocks: int
    rounds: int
    rate: float
    slo: Slo
    seed: int
    settle: float
    warm_up: int
    together: bool = False


WarmUp = Callable[[int], Awaitable[object]]


class ClockSweep:
    """One setup.

    Args:
        folder: of the setup; each run is a file ``run-NNN.json`` in it.
        lease: of the guard that sets clocks.
        warm_up: sends that many requests that are not measured.
        stop: set by the user's Ctrl+C.
        wanted: whether the process that requested the sweep still runs; otherwise it ends, and clocks are reset.
    """

    def __init__(self, title: str, folder: Path, plan: ClockPlan, devices: Devices, lease: Lease, client: Client,
                 warm_up: WarmUp, progress: Progress, stop: asyncio.Event, seconds: float,
                 wanted: Callable[[], bool] = lambda: True) -> None:  # fmt: skip
        self._title = title
        self._folder = folder
        self._plan = plan
        self._devices = devices
        self._lease = lease
        self._client = client
        self._warm_up = warm_up
        self._progress = progress
        self._stop = stop
        self._seconds = seconds
        self._wanted = wanted
        self._watch = GpuWatch(devices, plan.roles)
        self.results: list[Result] = []

    async def run(self) -> bool:
        """All runs, and the verification; False when it was interrupted.

        Raises:
            LeaseError: the guard is gone or refuses; clocks are the default ones then.
            PowerError: a GPU cannot be read.
            ClientFailed: the load generator failed.
        """
        plan = self._plan
        async with self._beating():
            await self._warm_up(plan.warm_up)
            rate = plan.rate or await self._find_rate()
            self._progress.say(f"{self._title}: {rate:g} requests/s, {plan.rounds} rounds, {self._seconds:g} s each")
            clocks = {role: evenly(self._supported(words), plan.clocks) for role, words in plan.roles.items()}
            for run in runs.plan(clocks, plan.rounds, plan.seed, together=plan.together):
                if self._stop.is_set():
                    return False
                await self._one(run, rate)
            chosen = {} if plan.together else chosen_clocks(self.results, list(plan.roles))
            for run in runs.verification(chosen, plan.rounds) if chosen else ():
                if self._stop.is_set():
                    return False
                await self._one(run, rate)
        return True

    def _supported(self, words: Sequence[str]) -> list[int]:
        """SM clocks that every GPU of a role supports."""
        common = set.intersection(*(set(self._devices.find(word).supported_sm_clocks()) for word in words))
        if not common:
            raise PowerError(f"the GPUs {', '.join(words)} have no SM clock in common")
        return sorted(common)

    async def _find_rate(self) -> float:
        """Some of the highest rate at which default clocks keep the SLO."""
        best = 0.0
        for rate in QUIET_RATES:
            if self._stop.is_set():
                break
            measured = await self._measure(f"{self._title}, default clocks, {rate:g} requests/s", rate)
            if not figures(measured, self._plan.slo).kept:
                break
            best = rate
        return best * SHARE_OF_CAPACITY or QUIET_RATES[0] / 2

    async def _one(self, run: Run, rate: float) -> None:
        for role, words in self._plan.roles.items():
            for word in words:
                if role in run.clocks:
                    self._lease.set(word, sm=str(run.clocks[role]))
                else:
                    self._lease.default(word)
        await self._pause(self._plan.settle)
        await self._warm_up(1)
        self._watch.begin()
        measured = await self._measure(f"{self._title}, {run}", rate)
        energy = self._watch.end()
        if measured.interrupted:
            return
        result = result_from(run, measured, self._plan.slo, energy)
        self.results.append(result)
        path = self._folder / f"run-{len(self.results):03d}.json"
        path.write_text(json.dumps({"format": runs.FORMAT, **result.to_json()}, indent=1), encoding="utf-8")
        self._progress.say(line(run, result))

    async def _measure(self, text: str, rate: float) -> Measurement:
        self._progress.begin(text, self._seconds)
        return await self._client.measure(rate, self._stop, self._progress.update)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    @contextlib.asynccontextmanager
    async def _beating(self) -> AsyncIterator[None]:
        """Within, the guard gets signs of life and the GPUs are sampled."""

        async def beat() -> None:
            while self._wanted():
                self._lease.beat()
                for _ in range(round(BEAT_SECONDS / SAMPLE_SECONDS)):
                    self._watch.sample()
                    await asyncio.sleep(SAMPLE_SECONDS)

        task = asyncio.create_task(beat())
        # It ends early when the guard is gone, or nobody wants the sweep any more.
        task.add_done_callback(lambda _: self._stop.set())
        try:
            yield
        finally:
            failed = task.done() and not task.cancelled()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task if failed else await asyncio.gather(task, return_exceptions=True)


def result_from(run: Run, measured: Measurement, slo: Slo, energy: Mapping[str, runs.RoleEnergy]) -> Result:
    """What a run has shown, from its requests and its GPUs."""
    found = figures(replace(measured, power={}), slo)
    answered = [shot for shot in measured.shots if shot.answered]
    return Result(
        run, measured.rate, measured.seconds, found.answered, sum(shot.prompt_tokens for shot in answered),
        sum(shot.output_tokens for shot in answered), found.ttft_ms, found.tpot_ms, found.share, found.kept, energy,
    )  # fmt: skip


def line(run: Run, result: Result) -> str:
    """One run in one line."""
    tokens = [
        f"{role} {1e3 * joules:.1f} mJ/token"
        for role in result.energy
        if (joules := result.joules_per_token(role)) is not None
    ]
    reasons = sorted({reason for one in result.energy.values() for reason in one.throttled})
    mark = f", THROTTLED ({', '.join(reasons)})" if reasons else ""
    slo = "kept" if result.kept else "broken"
    return f"{run}: {', '.join(tokens)}, {result.requests_per_wh:.0f} requests/Wh, SLO {slo}{mark}"
