"""The decision: the pair, or one engine alone, or to wait; by what was learnt of simulated figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from disagg_proxy.cluster.choice import NoCapacity, Pair, PlacementPreference, SingleEngine, Way, Wish, WouldBeLate
from disagg_proxy.cluster.engine_load import EngineLoad
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.cluster.policies import DECODE_POLICIES, PREFILL_POLICIES, Traits
from disagg_proxy.cluster.policies.table import PrefixTable
from disagg_proxy.cluster.selection import Selection
from disagg_proxy.connectors.disagg_kv import KIND
from disagg_proxy.openai.prefix_hash import ENDS
from disagg_proxy.placement.elastic import Elastic
from disagg_proxy.placement.goals import Goals
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.telemetry.request_recorder import RequestRecorder
from tests.cluster.conftest import World

SLO = Goals(0.4, 0.010)
EITHER = PlacementPreference.EITHER
PER_TOKEN, FIXED, STEP, SEQUENCE, HANDOVER = 15e-6, 0.008, 0.004, 45e-6, 0.012


class Bench:
    """One prefill and one decode, and what Elastic has learnt of them."""

    def __init__(self, goals: Goals) -> None:
        self.world = World()
        self.prefill = self.world.ready(Role.PREFILL, 1, kind=KIND)
        self.decode = self.world.ready(Role.DECODE, 2, kind=KIND)
        self.elastic = Elastic(self.world.registry, goals)
        self.selection = Selection(
            self.world.registry, PREFILL_POLICIES["prefix_aware"], DECODE_POLICIES["joint"], table=PrefixTable(ENDS)
        )
        self.selection.set_chooser(self.elastic)
        self.wish = Wish(128, 2128, self.world.time)

    def learn(self, *instances: Instance) -> None:
        for pace in map(self.elastic.pace, instances or (self.prefill, self.decode)):
            for number in range(20):
                pace.add_prefill(FIXED + PER_TOKEN * 200 * number, 200 * number, 0)
                pace.add_step(STEP + SEQUENCE * number, number, 0.0)
                pace.add_handover(HANDOVER)

    def place(self, tokens: int = 2000, **more: Any) -> Pair | SingleEngine:
        wish = more.pop("wish", self.wish)
        return self.selection.place("m", EITHER, traits=Traits(tokens), wish=wish, **more)

    def way(self, tokens: int = 2000) -> Way:
        found = self.place(tokens)
        assert found.forecast is not None
        return found.forecast.way

    def serve(self, found: Pair | SingleEngine) -> Placement:
        return Placement(self.world.registry, found, 0, self.wish.kv)

    def record(self, found: Pair | SingleEngine, ttft: float, **more: Any) -> RequestRecord:
        pair = isinstance(found, Pair)
        record = RequestRecorder.standalone().open("/v1/completions", None)
        for name, value in {
            "forecast": found.forecast, "first_byte": ttft, "admitted": 0.0, "prefill": "p" if pair else None,
            "prefill_sent": 0.0 if pair else None, "prefill_done": ttft - HANDOVER if pair else None,
            "decode_sent": 0.0, "output_tokens": 128, "outcome": "ok", "ended": ttft + 0.6, "streamed": True, **more,
        }.items():  # fmt: skip
            setattr(record, name, value)
        return record


@pytest.fixture
def bench() -> Bench:
    return Bench(SLO)


def loaded(instance: Instance, decoding: int = 0, computing: int = 0) -> None:
    """With answers of 128 tokens."""
    instance.decoding, instance.computing_tokens = decoding, computing
    instance.answering, instance.output_tokens = decoding, 128 * decoding


def test_until_something_is_learnt_everything_is_split(bench: Bench) -> None:
    assert bench.elastic.state == "learning"
    assert all(bench.way() is Way.SPLIT for _ in range(3))
    bench.learn()
    assert bench.elastic.state == "elastic"


def test_at_low_load_one_engine_serves_alone(bench: Bench) -> None:
    """It has no hand-over, so its first token is sooner."""
    bench.learn()
    assert bench.way() in (Way.PREFILL_ALONE, Way.DECODE_ALONE)


def test_a_decode_whose_answers_would_be_too_slow_computes_no_prompt(bench: Bench) -> None:
    bench.learn()
    loaded(bench.decode, decoding=105)
    loaded(bench.prefill, computing=6000)
    assert bench.way() is not Way.DECODE_ALONE


def test_a_long_queue_on_prefill_sends_prompts_to_decode(bench: Bench) -> None:
    bench.learn()
    loaded(bench.prefill, computing=16_000)
    loaded(bench.decode, decoding=20)
    assert bench.way() is Way.DECODE_ALONE


def test_a_busy_decode_sends_answers_to_prefill(bench: Bench) -> None:
    bench.learn()
    loaded(bench.decode, decoding=200)
    assert bench.way() is Way.PREFILL_ALONE


def test_answers_on_a_prefill_count_when_it_gets_a_prompt(bench: Bench) -> None:
    bench.learn()
    loaded(bench.decode, decoding=20)
    loaded(bench.prefill, decoding=90)
    assert bench.way() is Way.DECODE_ALONE


def test_the_prompts_that_a_decode_computes_are_metered(bench: Bench) -> None:
    bench.learn()
    loaded(bench.prefill, computing=14_000)
    loaded(bench.decode, decoding=5, computing=2000)
    assert bench.way(2000) is Way.DECODE_ALONE, "4,000 tokens take 60 ms, less than 8 times 10 ms"
    loaded(bench.decode, decoding=5, computing=5000)
    assert bench.way(2000) is not Way.DECODE_ALONE
    loaded(bench.decode, decoding=0, computing=5000)
    assert bench.way(2000) is Way.DECODE_ALONE, "there is no answer to hold up"


def test_what_would_be_late_wherever_it_went_waits(bench: Bench) -> None:
    bench.learn()
    loaded(bench.prefill, computing=40_000)
    loaded(bench.decode, decoding=5, computing=40_000)
    with pytest.raises(WouldBeLate):
        bench.place()
    late = Wish(128, 2128, bench.world.time, late=True)
    with pytest.raises(NoCapacity):
        bench.place(wish=late)
    loaded(bench.prefill, computing=2000)
    assert bench.place(wish=late)


def test_the_time_that_it_has_waited_counts(bench: Bench) -> None:
    bench.learn()
    bench.world.time += 0.3
    with pytest.raises(WouldBeLate):
        bench.place()
    assert bench.place(wish=Wish(128, 2128, bench.world.time))


def test_a_prompt_that_takes_longer_than_the_slo_alone_is_served_nevertheless(bench: Bench) -> None:
    bench.learn()
    assert bench.place(60_000)


def test_where_answers_would_become_too_slow_requests_wait(bench: Bench) -> None:
    bench.learn()
    loaded(bench.decode, decoding=140)
    loaded(bench.prefill, decoding=140)
    with pytest.raises(NoCapacity) as why:
        bench.place()
    assert why.type is NoCapacity, "others do not overtake it"
    loaded(bench.decode, decoding=5)
    assert bench.place()


def test_an_slo_that_no_engine_can_meet_stops_nothing() -> None:
    bench = Bench(Goals(0.4, 0.001))
    bench.learn()
    loaded(bench.decode, decoding=50)
    loaded(bench.prefill, decoding=50)
    assert bench.place()


def test_without_an_slo_nothing_waits() -> None:
    bench = Bench(Goals())
    bench.learn()
    loaded(bench.prefill, computing=400_000, decoding=200)
    loaded(bench.decode, decoding=250, computing=100_000)
    assert bench.place()


def test_without_an_slo_others_are_not_delayed_for_little() -> None:
    bench = Bench(Goals())
    bench.learn()
    loaded(bench.decode, decoding=30)
    loaded(bench.prefill, decoding=3, computing=2000)
    assert bench.way() is not Way.DECODE_ALONE
    loaded(bench.prefill, decoding=3, computing=100_000)
    assert bench.way() is Way.DECODE_ALONE


def test_a_prefill_whose_kv_cache_is_full_serves_nothing_alone(bench: Bench) -> None:
    bench.learn()
    loaded(bench.decode, decoding=200)
    bench.prefill.engine_load = EngineLoad(0.0, kv_capacity_tokens=10_000)
    bench.prefill.kv_committed = 9000
    with pytest.raises(NoCapacity):
        bench.place()


def test_without_capacity_on_decode_prefill_serves_alone(bench: Bench) -> None:
    bench.learn()
    found = bench.place(has_capacity=lambda i: i is bench.prefill)
    assert found == SingleEngine(bench.prefill)
    with pytest.raises(NoCapacity):
        bench.place(has_capacity=lambda i: False)


def test_a_decision_compares_eight_engines_at_most(bench: Bench) -> None:
    for port in range(10, 30):
        bench.world.ready(Role.DECODE, port, kind=KIND)
    bench.learn()
    compared: list[int] = []
    decide = bench.elastic.decide

    class Counting:
        def decide(self, pair: Any, engines: Any, uncached: Any, traits: Any, wish: Any) -> Any:
            compared.append(len(engines))
            return decide(pair, engines, uncached, traits, wish)

    bench.selection.set_chooser(Counting())
    chosen = [bench.serve(bench.place()).decode for _ in range(22)]
    assert set(compared) == {8} and len(set(chosen)) > 8


def test_what_an_engine_has_in_its_prefix_cache_is_not_computed(bench: Bench) -> None:
    bench.learn()
    loaded(bench.prefill, computing=3000)
    loaded(bench.decode, decoding=60)
    known = Traits(2000, (1, 2), 8000)
    first = bench.selection.place("m", EITHER, traits=known, wish=bench.wish)
    assert isinstance(first, SingleEngine) and first.engine is bench.decode and first.computes == 2000
    again = bench.selection.place("m", EITHER, traits=known, wish=bench.wish)
    assert isinstance(again, SingleEngine) and again.engine is bench.decode and again.computes < 2000


def test_what_is_on_an_engine_is_counted_until_its_end(bench: Bench) -> None:
    bench.learn()
    placement = bench.serve(SingleEngine(bench.prefill, 2000, 1500))
    engine = bench.prefill
    assert (engine.computing_tokens, engine.tokens_in_flight, engine.decoding, engine.answering) == (1500, 2000, 0, 1)
    placement.computed()
    placement.computed()
    assert (engine.computing_tokens, engine.tokens_in_flight, engine.decoding, engine.answering) == (0, 0, 1, 1)
    assert engine.kv_committed == 2128
    placement.release()
    placement.computed()
    assert (engine.computing_tokens, engine.decoding, engine.answering, engine.kv_committed) == (0, 0, 0, 0)
    placement = bench.serve(Pair(bench.prefill, bench.decode, 1500, 2000))
    assert (engine.computing_tokens, bench.decode.computing_tokens, bench.decode.answering) == (1500, 0, 1)
    assert placement.prefill_lease is not None
    placement.prefill_lease.end(failed=False)
    assert engine.computing_tokens == 0 == engine.answering
    placement.release()
    assert bench.decode.kv_committed == 0 == bench.decode.decoding


def test_engines_that_differ_by_a_third_from_what_was_learnt_are_still_trusted(bench: Bench) -> None:
    bench.learn()
    for _ in range(200):
        found = bench.place()
        forecast = found.forecast
        assert forecast is not None
        actual = 1.3 * (FIXED + PER_TOKEN * forecast.tokens) + HANDOVER * isinstance(found, Pair)
        bench.elastic.learn_first_token(bench.record(found, actual))
        bench.world.time += 1.0
        bench.wish.arrived = bench.world.time
    assert bench.elastic.state == "elastic" and bench.elastic.trust.error < 0.1


def test_wrong_predictions_lead_to_splits_until_they_are_right(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.learn()
    monkeypatch.setattr("disagg_proxy.placement.pace.Pace.add_prefill", lambda *_: None)

    def served(actual: Callable[[float], float]) -> None:
        found = bench.place()
        assert found.forecast is not None
        bench.elastic.learn_first_token(bench.record(found, actual(found.forecast.ttft)))
        bench.world.time += 1.0
        bench.wish.arrived = bench.world.time

    for _ in range(30):
        served(lambda ttft: 10 * ttft)
    assert bench.elastic.state == "fallback" and "requests are split" in caplog.text
    loaded(bench.prefill, computing=100_000)
    assert bench.way() is Way.SPLIT
    loaded(bench.prefill)
    for _ in range(60):
        served(lambda ttft: ttft)
    assert bench.elastic.state == "elastic" and "right again" in caplog.text


def test_what_is_learnt_from_an_answer(bench: Bench) -> None:
    found = bench.place()
    bench.serve(found).computed()
    record = bench.record(found, 0.05)
    bench.elastic.learn_first_token(record)
    bench.elastic.learn_end(record)
    prefill, decode = bench.elastic.pace(bench.prefill), bench.elastic.pace(bench.decode)
    assert prefill.prefill.samples == 1 and prefill.prefill_seconds(2000, 0) == pytest.approx(0.038)
    assert decode.step.samples == 1 and decode.step_seconds(1) == pytest.approx(0.6 / 127)
    report = bench.elastic.report()
    assert set(report["engines"]) == {"127.0.0.1:1", "127.0.0.1:2"} and report["state"] == "learning"


@pytest.mark.parametrize(
    "change", [{"outcome": "cut"}, {"output_tokens": 3}, {"paused": True}, {"forecast": None}, {"ended": None}]
)
def test_what_says_nothing_of_the_step_is_not_learnt(bench: Bench, change: dict[str, Any]) -> None:
    found = bench.place()
    record = bench.record(found, 0.05)
    for name, value in change.items():
        setattr(record, name, value)
    bench.elastic.learn_end(record)
    assert bench.elastic.pace(bench.decode).step.samples == 0


def test_an_answer_that_is_not_streamed_shows_prefill_and_step(bench: Bench) -> None:
    found = bench.place()
    record = bench.record(found, 0.05)
    record.streamed, record.first_byte = False, record.ended
    bench.elastic.learn_end(record)
    assert bench.elastic.pace(bench.prefill).prefill.samples == bench.elastic.pace(bench.decode).step.samples == 1
