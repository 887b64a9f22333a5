"""Sweeps over clocks of simulated GPUs in virtual time, whose best clock is known, and what the report says."""

from __future__ import annotations

import asyncio
import io
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from disagg_power.clock_values import ClockSetting, evenly, nearest
from disagg_power.devices import POWER_CAP, Reading
from disagg_power.lease import Lease, LeaseError
from disagg_power.simulated import GpuModel, Phase, SimulatedGpu, SimulatedGpus, best_clock
from disagg_report.client import Watch
from disagg_report.clocks import choice, folder, runs, summary
from disagg_report.clocks.choice import curve, judge
from disagg_report.clocks.gpus import measured
from disagg_report.clocks.runs import Result, RoleEnergy, Run
from disagg_report.clocks.sweep import ClockPlan, ClockSweep
from disagg_report.progress import Progress
from disagg_report.records import Measurement, Shot
from disagg_report.slo import Slo

SLO = Slo(1000, 50, 0.9)
ROLES: tuple[Phase, ...] = ("prefill", "decode")
SHAPES = {
    "flat": GpuModel(),
    "steep": GpuModel(idle_w=60, dynamic_w=500, exponent=3.0, knee_mhz=1500),
    "early knee": GpuModel(idle_w=140, dynamic_w=420, exponent=2.6, knee_mhz=900),
}
"""Shapes of the curve of energy over clock, with minima at different clocks."""


class World:
    """Simulated GPUs that work as fast as their clocks permit; the time is virtual."""

    def __init__(self, model: GpuModel, noise: float = 0.0, seed: int = 1) -> None:
        self.now = 0.0
        self.gpus = SimulatedGpus(models=[model, model], clock=lambda: self.now)
        self.dice = random.Random(seed)
        self.noise = noise
        self.set: list[tuple[str, str]] = []
        self.fails_after = 0

    def gpu(self, role: str) -> SimulatedGpu:
        return self.gpus.all()[ROLES.index(role)]

    name = "virtual"

    async def measure(self, rate: float, stop: asyncio.Event, watch: Watch) -> Measurement:
        """Each role computes its tokens at full load for a good minute; then the GPUs are idle."""
        await asyncio.sleep(0)
        times = {}
        begin = self.now
        for role in ROLES:
            times[role] = 60 / self.gpu(role).pace(role) * self.dice.uniform(1 - self.noise, 1 + self.noise)
        for role in sorted(times, key=lambda one: times[one]):
            self.gpu(role).set_load(1.0, owner=role)
        for role in sorted(times, key=lambda one: times[one]):
            self.now = begin + times[role]
            self.gpu(role).set_load(0.0, owner=role)
        ttft, tpot = 100 * times["prefill"] / 60, 20 * times["decode"] / 60
        shot = Shot(0.0, ttft, (tpot,), ttft + 199 * tpot, 10_000, 200)
        return Measurement(rate, times["decode"], (shot,) * 100)

    def window(self) -> tuple[float, float] | None:
        return None


class DirectLease(Lease):
    """Sets the GPUs of a world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def set(self, gpu: str, *, sm: str = "", memory: str = "", power: str = "") -> dict[str, object]:
        device = self._world.gpus.find(gpu)
        device.lock_sm_clocks(device.supported_sm_clocks()[0], int(sm))
        self._world.set.append((gpu, sm))
        return {}

    def default(self, gpu: str) -> None:
        self._world.gpus.find(gpu).reset_sm_clocks()

    def beat(self) -> None:
        if self._world.fails_after and len(self._world.set) >= self._world.fails_after:
            raise LeaseError("gone", "the guard is gone")


async def swept(world: World, path: Path, **changes: object) -> list[Result]:
    plan = ClockPlan({"prefill": ["0"], "decode": ["1"]}, 12, 3, 2.0, SLO, 7, 0.0, 1)
    plan = replace(plan, **changes)  # type: ignore[arg-type]

    async def warm_up(count: int) -> None:
        await asyncio.sleep(0)

    path.mkdir(exist_ok=True)
    sweep = ClockSweep("1 prefill + 1 decode", path, plan, world.gpus, DirectLease(world), world, warm_up,
                       Progress(io.StringIO()), asyncio.Event(), 60)  # fmt: skip
    assert await sweep.run()
    return sweep.results


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
async def test_the_best_clock_is_found_within_one_step(tmp_path: Path, shape: str, seed: int) -> None:
    """Of the model's known optimum, with 1 % of noise in the times; prefill's and decode's curves differ in shape."""
    model = SHAPES[shape]
    world = World(model, noise=0.01, seed=seed)
    results = await swept(world, tmp_path / "setup")
    steps = evenly(model.clocks(), 12)
    for role in ROLES:
        best = curve(results, role).best
        assert best is not None and best.mhz is not None
        known = best_clock(model, role)
        assert abs(steps.index(best.mhz) - steps.index(nearest(steps, known))) <= 1, (role, best.mhz, known)
    verdict = judge(results, ROLES)
    assert verdict.kept and verdict.saving is not None and verdict.saving > 0.1


async def test_where_the_slo_binds_it_is_the_lowest_clock_that_keeps_it(tmp_path: Path) -> None:
    """TTFT is 100 ms at the highest clock, so 200 ms permit half of it."""
    world = World(GpuModel())
    results = await swept(world, tmp_path / "setup", slo=Slo(200, 50, 0.9))
    best = curve(results, "prefill").best
    above = [clock for clock in evenly(GpuModel().clocks(), 12) if clock >= 1980 / 2]
    assert best is not None and best.mhz == above[0] > best_clock(GpuModel(), "prefill") + 150


async def test_each_run_sets_one_role_and_the_verification_both(tmp_path: Path) -> None:
    world = World(GpuModel())
    results = await swept(world, tmp_path / "setup", clocks=2, rounds=2)
    assert [len(one.run.clocks) for one in results[:10]].count(0) == 2
    assert sorted((gpu, sm) for gpu, sm in world.set[:8]) == sorted(
        [("0", "345"), ("0", "1980"), ("1", "345"), ("1", "1980")] * 2
    )
    assert [one.run.kind for one in results[10:]] == ["verify", "default"] * 2
    read = [runs.result_of(folder._load(path), "x") for path in sorted((tmp_path / "setup").glob("run-*.json"))]
    assert read == results, "every run is on disk as soon as it has ended"


async def test_at_equal_clocks_all_roles_change_together(tmp_path: Path) -> None:
    world = World(GpuModel())
    results = await swept(world, tmp_path / "setup", clocks=3, rounds=1, together=True)
    assert len(results) == 4 and all(len(set(one.run.clocks.values())) <= 1 for one in results)


async def test_a_guard_that_is_gone_ends_the_sweep(tmp_path: Path) -> None:
    world = World(GpuModel())
    world.fails_after = 1
    world_measure = world.measure

    async def measure(rate: float, stop: asyncio.Event, watch: Watch) -> Measurement:
        if world.set:
            await stop.wait()
            return replace(await world_measure(rate, stop, watch), interrupted=True)
        return await world_measure(rate, stop, watch)

    world.measure = measure  # type: ignore[method-assign]
    with pytest.raises(LeaseError, match="gone"):
        await swept(world, tmp_path / "setup", clocks=2)


async def test_a_sweep_that_nobody_wants_any_more_ends(tmp_path: Path) -> None:
    """As when the script that has started it was killed."""
    world, stop = World(GpuModel()), asyncio.Event()
    plan = ClockPlan({"prefill": ["0"], "decode": ["1"]}, 4, 3, 2.0, SLO, 7, 0.0, 1)

    async def warm_up(count: int) -> None:
        await asyncio.sleep(0)

    sweep = ClockSweep("title", tmp_path, plan, world.gpus, DirectLease(world), world, warm_up,
                       Progress(io.StringIO()), stop, 60, lambda: False)  # fmt: skip
    assert await sweep.run() is False and stop.is_set()


async def test_without_a_rate_it_takes_some_of_what_default_clocks_serve(tmp_path: Path) -> None:
    world = World(GpuModel())
    (first, *_) = await swept(world, tmp_path / "setup", clocks=2, rounds=1, rate=0.0)
    assert first.rate == pytest.approx(0.6 * 128)


# -- order


def test_rounds_have_an_order_of_their_own_and_the_same_runs() -> None:
    plan = runs.plan({"prefill": [1, 2, 3], "decode": [1, 2, 3]}, 3, seed=5)
    rounds = [[str(run.clocks) for run in plan if run.round == number] for number in range(3)]
    assert [len(one) for one in rounds] == [7, 7, 7]
    assert len({tuple(one) for one in rounds}) == 3 and len({frozenset(one) for one in rounds}) == 1
    assert [run.round for run in plan] == sorted(run.round for run in plan)
    assert plan == runs.plan({"prefill": [1, 2, 3], "decode": [1, 2, 3]}, 3, seed=5)


# -- choice


def result(mhz: int | None, joules: float, *, kept: bool = True, throttled: bool = False, number: int = 0) -> Result:
    run = Run(runs.DEFAULT, number) if mhz is None else Run(runs.SWEEP, number, {"decode": mhz}, "decode")
    reasons = ("sw_thermal_slowdown",) if throttled else ()
    energy = {"decode": RoleEnergy(joules, True, 60.0, reasons)}
    return Result(run, 2.0, 30.0, 60, 600, 100, (1.0, 2.0), (3.0, 4.0), 1.0 if kept else 0.5, kept, energy)


def best(results: list[Result]) -> int | None:
    found = curve(results, "decode").best
    return found.mhz if found else None


def test_a_clock_that_breaks_the_slo_is_not_the_best() -> None:
    assert best([result(600, 10, kept=False), result(900, 20), result(1200, 30), result(None, 40)]) == 900
    assert best([result(600, 10, kept=False)]) is None
    mostly = [result(600, 10), result(600, 10, kept=False, number=1), result(900, 20)]
    assert best(mostly) == 900, "half of the rounds are not most of them"


def test_of_equal_energies_the_higher_clock_is_chosen() -> None:
    assert best([result(600, 100.0), result(900, 100.9), result(1200, 101.5)]) == 900


def test_a_throttled_run_counts_only_where_there_is_no_other() -> None:
    hot = [result(600, 5, throttled=True), result(600, 50, number=1), result(900, 20), result(1200, 30, throttled=True)]
    points = {point.mhz: point for point in curve(hot, "decode").points}
    assert points[600].joules_per_token == 0.5 and not points[600].throttled
    assert points[1200].throttled and best(hot) == 900


def test_the_median_of_the_rounds_counts() -> None:
    assert best([*(result(600, j, number=n) for n, j in enumerate([10, 10, 90])), result(900, 20)]) == 600


# -- GPUs


def readings(*samples: Mapping[str, float | int | None]) -> list[Reading]:
    return [Reading(**{"at": float(at), **one}) for at, one in enumerate(samples)]  # type: ignore[arg-type]


def test_energy_is_from_the_counter_and_from_power_without_one() -> None:
    counted = measured(readings({"energy_mj": 1000, "power_w": 9.0}, {"energy_mj": 3500, "power_w": 9.0}))
    assert (counted.joules, counted.counted) == (2.5, True)
    integral = measured(readings({"power_w": 10.0}, {"power_w": 20.0}, {"power_w": 20.0}))
    assert (integral.joules, integral.counted) == (35.0, False)
    restarted = measured(readings({"energy_mj": 9000, "power_w": 10.0}, {"energy_mj": 50, "power_w": 10.0}))
    assert (restarted.joules, restarted.counted) == (10.0, False)


def test_a_reason_that_lasts_marks_the_run() -> None:
    short = [{"energy_mj": 0, "throttle": POWER_CAP}, *[{"energy_mj": 0}] * 19]
    assert measured(readings(*short)).throttled == ()
    assert measured(readings(*short[:5])).throttled == ("sw_power_cap",)
    assert measured(readings({"temperature_c": 41.0}, {"temperature_c": 60.5}, {})).hottest_c == 60.5


# -- the page


@pytest.fixture
def report(tmp_path: Path) -> folder.ClockReport:
    header = folder.ClockHeader("2026-11-29T12:00:00+00:00", SLO, 512, 64, 30, 1, False, {"GPU": "H|200"})
    folder.write_header(tmp_path, header)
    world = World(GpuModel())
    path = tmp_path / "setups" / "01-pd"
    setup = folder.ClockSetup("pd", "1 prefill + 1 decode", "pd", ROLES)
    folder.write_setup(path, setup)
    asyncio.run(swept(world, path, clocks=6))
    return folder.read_report(tmp_path)


def test_one_sentence_says_what_to_set_and_what_it_saves(report: folder.ClockReport) -> None:
    sentence = summary.verdict(report)
    assert sentence.startswith("Set PREFILL_SM_CLOCK=") and " DECODE_SM_CLOCK=" in sentence
    assert "less energy a request than default clocks" in sentence and "requests/Wh" in sentence
    assert "Plain engines at their own best clock were not measured" in sentence


def test_the_page_has_each_clock_of_each_role(report: folder.ClockReport, tmp_path: Path) -> None:
    page = summary.summary(report, [], "no reason")
    for text in ("prefill MHz", "decode MHz", "| default |", "mJ per prompt token", "Verified together", "H/200"):
        assert text in page, text
    assert page.count("\n| **") == 2, "the best clock of each role is marked"
    assert folder.is_about_clocks(tmp_path) and not folder.is_about_clocks(tmp_path / "setups")


def plain(report: folder.ClockReport, joules: Callable[[int], float]) -> folder.ClockReport:
    """With plain engines that need so many joules for 60 requests."""
    energies = [(600, runs.SWEEP), (1200, runs.SWEEP), (0, runs.DEFAULT), (600, runs.VERIFY)]
    found = tuple(
        replace(
            result(900, joules(mhz)), run=Run(kind, 0, {"plain": mhz} if mhz else {}),
            energy={"plain": RoleEnergy(joules(mhz), True)},
        )
        for mhz, kind in energies
    )  # fmt: skip
    return replace(
        report,
        setups=[*report.setups, folder.ClockSetup("plain", "2 plain engines", "plain", ("plain",), results=found)],
    )


def test_plain_engines_at_their_own_best_clock_are_the_baseline(report: folder.ClockReport) -> None:
    better = summary.verdict(plain(report, lambda mhz: 1.0 if mhz == 600 else 2.0))
    assert "2 plain engines at 600 MHz serve 216000 requests/Wh: P/D serves 100% fewer." in better
    assert "more." in summary.verdict(plain(report, lambda mhz: 1e9 + mhz))


def test_clocks_that_save_nothing_are_not_recommended(report: folder.ClockReport) -> None:
    (setup,) = report.setups
    worse = tuple(
        replace(one, energy={role: replace(e, joules=2 * e.joules) for role, e in one.energy.items()})
        if one.run.kind == runs.VERIFY else one
        for one in setup.results
    )  # fmt: skip
    assert summary.verdict(replace(report, setups=[replace(setup, results=worse)])).startswith("Set no clocks")
    broken = tuple(replace(one, kept=one.run.kind != runs.VERIFY) for one in setup.results)
    assert "together they do not keep the SLO" in summary.verdict(
        replace(report, setups=[replace(setup, results=broken)])
    )
    nothing = tuple(replace(one, kept=False) for one in setup.results if one.run.kind != runs.VERIFY)
    assert "kept the SLO at" in summary.verdict(replace(report, setups=[replace(setup, results=nothing)]))
    assert summary.verdict(replace(report, setups=[])) == "Nothing was measured."


def test_equal_plots_for_equal_figures(report: folder.ClockReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from disagg_report.clocks.plots import draw

    both = plain(report, float)
    first = {path.name: path.read_bytes() for path in draw(both, tmp_path)}
    assert first == {path.name: path.read_bytes() for path in draw(both, tmp_path)}
    names = {"energy_prefill.svg", "energy_decode.svg", "energy_plain.svg", "pareto_prefill_ttft.svg"}
    assert names < first.keys() and b"cap of the SM clock" in first["energy_decode.svg"]


def test_clocks_are_spread_over_what_is_supported() -> None:
    clocks = evenly(GpuModel().clocks(), 12)
    assert len(clocks) == 12 and all(b > a for a, b in itertools.pairwise(clocks))
    assert str(ClockSetting(clocks[0])) == "345" and choice.EQUAL_WITHIN < 0.05
