"""The comparison of plain, split and elastic engines in small: its engines, its bound and its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.elastic import report
from bench.elastic.arms import Arm, arms
from bench.elastic.bound import bounds, upper_bound
from bench.elastic.cli import main
from bench.elastic.sweep import Point, knee
from bench.elastic.trial import Slo, Trial
from bench.elastic.workloads import NAMES, Shape, arrivals, shape
from bench.virtual.clock import VirtualLoop
from bench.virtual.engine import Engine, Sequence, Transfer
from disagg_sim.step_model import H200, EngineProfile, load_profile

PROFILE = EngineProfile(
    name="test", source="made up",
    step_seconds=0.001, connector_step_seconds=0.0, mixed_step_seconds=0.0, prefill_token_seconds=1e-5,
    prefill_context_tokens=0, sequence_seconds=0.0, context_token_seconds=0.0, load_seconds=0.002,
    hand_over_seconds=0.005, hand_over_tokens_per_second=1e6, request_seconds=0.003,
    delivery_seconds=0.0, kv_cache_tokens=10_000,
    max_num_batched_tokens=1000,
)  # fmt: skip


class World:
    """Engines on a virtual clock, and when what happened."""

    def __init__(self, profile: EngineProfile = PROFILE, count: int = 1) -> None:
        self.loop = VirtualLoop()
        self.engines = [Engine(self.loop, profile) for _ in range(count)]
        self.first: dict[int, float] = {}
        self.done: dict[int, float] = {}
        self._next = 0

    def sequence(self, tokens: int, output: int = 1) -> Sequence:
        number = self._next = self._next + 1
        blocks = tuple(range(number * 1000, number * 1000 + max(1, tokens // 64)))
        return Sequence(
            blocks, 64, tokens, output,
            first_token=lambda: self.first.setdefault(number, self.loop.time()),  # type: ignore[arg-type]
            done=lambda: self.done.setdefault(number, self.loop.time()),  # type: ignore[arg-type]
        )  # fmt: skip

    def split(self, tokens: int, output: int) -> Sequence:
        """A request on the first two engines; returns what decode serves."""
        giver, taker = self.sequence(tokens), self.sequence(tokens, output)
        giver.transfer = taker.transfer = Transfer(self.engines[0], self.engines[1], tokens, giver, taker)
        self.engines[0].submit(giver)
        self.engines[1].submit(taker)
        return taker

    def run(self) -> None:
        with pytest.raises(RuntimeError, match="everybody waits"):
            self.loop.run_forever()
        self.loop.close()
        for engine in self.engines:
            assert (engine.running, engine.waiting, engine.kv_usage) == (0, 0, 0.0)


def test_a_long_prompt_is_computed_in_chunks_and_holds_up_others() -> None:
    world = World()
    world.engines[0].submit(world.sequence(100, 100))
    world.loop.call_at(0.02, world.engines[0].submit, long := world.sequence(2500, 1))
    world.run()
    assert world.first[1] == pytest.approx(0.003 + 0.001 + 100 * 1e-5)
    # Beside a running sequence a step has 999 tokens left for prompts.
    assert long.computed == 2500 and world.engines[0].computed == 2600
    slow = [seconds for _, seconds, _ in world.engines[0].gaps if seconds > 0.0011]
    assert slow == pytest.approx([0.001 + 999e-5, 0.001 + 999e-5, 0.001 + 502e-5])
    assert world.done[1] - world.first[1] == pytest.approx(99 * 0.001 + 2500e-5)


def test_a_prefix_is_computed_once() -> None:
    world = World()
    one, other = world.sequence(640), world.sequence(640)
    other.blocks = one.blocks
    world.engines[0].submit(one)
    world.loop.call_at(1.0, world.engines[0].submit, other)
    world.run()
    assert (one.hits, other.hits) == (0, 639)


def test_kv_is_handed_over_after_prefill() -> None:
    world = World(count=2)
    world.split(500, 3)
    world.run()
    loaded = 0.003 + 0.001 + 500e-5 + PROFILE.hand_over(500)
    assert world.first[2] == pytest.approx(loaded + 0.001 + 0.002)
    assert world.done[2] == pytest.approx(world.first[2] + 2 * 0.001)
    assert world.engines[1].computed == 0


def test_the_newest_sequence_gives_way_when_kv_runs_out() -> None:
    world = World()
    for _ in range(2):
        world.engines[0].submit(world.sequence(4500, 800))
    world.run()
    assert world.engines[0].preempted and world.done[1] < world.done[2]
    assert world.engines[0].computed > 3 * 4500


def test_kv_that_decode_cannot_take_is_dropped_and_computed_again() -> None:
    world = World(count=2)
    world.engines[1].submit(world.sequence(8000, 1500))
    world.loop.call_at(0.1, lambda: [world.split(3000, 5) for _ in range(4)])
    world.run()
    assert world.engines[1].twice == 3 and len(world.done) == 9
    assert world.engines[1].computed == 8000 + 3 * 3000


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    def figures(seed: int) -> dict[str, float]:
        trial = Trial(Arm("split", 1, 1), load_profile(H200), seed, Slo())
        trial.run(arrivals("2000/128", seed, 3.0, 20.0))
        return trial.figures(0.0, 3.0)

    assert figures(1) == figures(1) != figures(2)


@pytest.mark.parametrize("arm", [Arm("plain", 0, 2), Arm("split", 1, 1), Arm("split", 1, 1, alone=0.5)], ids=str)
def test_every_request_is_answered_and_gives_everything_back(arm: Arm) -> None:
    trial = Trial(arm, load_profile(H200), 1, Slo())
    sessions = arrivals("chat", 1, 8.0, 12.0)
    trial.run(sessions)
    assert len(trial.served) == sum(map(len, sessions)) and all(row.way for row in trial.served)
    assert trial.figures(0.0, 1e9)["hits"] > 0.3
    for instance in trial.proxy.registry.instances():
        assert instance.idle and not instance.tokens_in_flight and not instance.kv_waiting_tokens


def test_a_slow_engine_takes_longer() -> None:
    found = []
    for paces in (None, [1.0, 1.3]):
        trial = Trial(Arm("plain", 0, 2), load_profile(H200), 1, Slo(), paces)
        trial.run(arrivals("2000/128", 1, 5.0, 10.0))
        found.append(trial.figures(0.0, 5.0)["tpot_p50_ms"])
    assert found[1] > found[0]


# -- workloads and the bound


@pytest.mark.parametrize("name", NAMES)
def test_requests_arrive_at_the_rate_asked_for(name: str) -> None:
    sessions = arrivals(name, 1, 100.0, 20.0, (60.0, 20.0))
    assert sum(map(len, sessions)) / 100 == pytest.approx(20.0, rel=0.4)
    assert [session[0].at for session in sessions] == sorted(session[0].at for session in sessions)


def test_the_day_moves_from_long_prompts_to_long_answers() -> None:
    sessions = arrivals("day", 1, 100.0, 20.0, (30.0, 10.0))
    early, late = (
        [session[0].output > 400 for session in sessions if low <= session[0].at < low + 20] for low in (0.0, 80.0)
    )
    assert sum(early) / len(early) < 0.2 and sum(late) / len(late) > 0.6


def test_a_shape_is_what_its_requests_need() -> None:
    fixed = shape("2000/128")
    assert (fixed.computed, fixed.later, fixed.turns) == (2000, 127, 1)
    assert fixed.attended == 2000 * 1000 and fixed.read == 127 * 2064
    assert 0.1 < shape("chat").computed / 2000 < 0.5 and shape("chat").turns > 5


def test_the_bound_is_what_the_work_permits() -> None:
    # 10 ms of prefill each: two GPUs compute at most 200 prompts a second, and nothing is decoded.
    assert upper_bound(PROFILE, Shape(1000, 0, 0, 0), 2, 0.01) == pytest.approx(200)
    # Beside 100 steps of 1 ms a second 90 % are left for prompts; while nothing is decoded it is all of the time.
    one = upper_bound(replace(PROFILE, kv_cache_tokens=10**9), Shape(1000, 0, 10, 10_000), 1, 0.01)
    assert 90 < one < 100
    profile = load_profile(H200)
    for name in NAMES:
        assert bounds(profile, name, 4, 0.01)[0] == pytest.approx(2 * bounds(profile, name, 2, 0.01)[0])


@pytest.mark.parametrize("arm", [Arm("plain", 0, 2), Arm("split", 1, 1)], ids=str)
def test_no_arm_exceeds_the_bound(arm: Arm) -> None:
    bound, _ = bounds(load_profile(H200), "2000/128", 2, 0.01)
    trial = Trial(arm, load_profile(H200), 1, Slo())
    trial.run(arrivals("2000/128", 1, 10.0, bound))
    assert trial.figures(2.0, 10.0)["good"] < 1.0


# -- what follows


def test_the_knee_is_between_the_last_rate_kept_and_the_next() -> None:
    def points(*pairs: tuple[float, float]) -> list[Point]:
        return [{"rate": rate, "good": good} for rate, good in pairs]

    assert knee(points((10, 1.0), (20, 1.0), (30, 0.8))) == pytest.approx(25)
    assert knee(points((10, 0.5))) == 0.0 and knee(points((10, 0.95))) == 10
    assert knee(points((10, 1.0), (20, 0.85), (30, 0.9), (40, 0.1))) == 30


def test_arms_use_all_gpus() -> None:
    assert [arm.name for arm in arms(4)] == ["plain", "1P3D", "2P2D", "3P1D", "elastic"]
    assert {arm.gpus for arm in arms(4)} == {4}


def test_the_command_writes_tables_json_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    kinds = ["--kind", "plain", "--kind", "split", "--workload", "2000/128", "--gpus", "2"]
    out = ["--json", str(tmp_path / "out.json"), "--plots", str(tmp_path / "plots")]
    assert main([*kinds, *out, "--seconds", "2", "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| 2000/128 | 2 |" in printed and "goodput at 1.5 x knee" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    assert {one["arm"] for one in found["results"]} == {"plain", "1P1D"} and found["overload"]
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "2000-128-2.svg", "2000-128-2-unequal.svg", "2000-128-2-changed.svg",
    }  # fmt: skip
    assert report.knees(found["results"]) in printed


def test_wrong_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--gpus", "1"], "--gpus: at least 2"), (["--profile", "none"], "--profile: none: no such file"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
