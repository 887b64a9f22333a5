"""The times and the outcome of one request, and the sampling of its gaps."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from bench import observe
from disagg_proxy.cluster.instance import Role
from disagg_proxy.errors import (
    BadRequest,
    EngineDisconnected,
    EngineFailed,
    EngineFrozen,
    NoPair,
    Overloaded,
    ProxyError,
    shutting_down,
)
from disagg_proxy.telemetry.request_record import GAP_SAMPLE_INTERVAL

BROKEN = EngineDisconnected("broken", unsent=False, reused=False)


def test_times_of_a_streamed_request(desk, world) -> None:
    prefill, decode = world.ready(Role.PREFILL, 1, "m"), world.ready(Role.DECODE, 2, "m")
    record = desk.recorder.open("/v1/completions", "mine")
    for seconds, step in (
        (1, lambda: record.on_ready(None)), (2, record.on_admitted),
        (0, lambda: record.on_attempt(prefill, decode, "id")),
        (0, record.on_prefill_sent), (3, record.on_prefill_response), (0, record.on_decode_sent),
        (4, lambda: record.on_first_byte(True)),
    ):  # fmt: skip
        desk.after(seconds)
        step()
    record.waited = True
    assert (desk.recorder.stats.in_flight, desk.recorder.flows["127.0.0.1:1", "127.0.0.1:2"].in_flight) == (1, 1)
    desk.after(5)
    record.complete()
    record.end()
    assert (record.queue_time, record.prefill_time, record.ttft, record.total) == (2, 3, 10, 15)
    assert (record.model, record.prefill, record.decode) == ("m", "127.0.0.1:1", "127.0.0.1:2")
    assert (record.outcome, record.cause, record.tries, record.unix) == ("ok", None, 1, 1_000_000.0)
    stats = desk.recorder.stats
    assert stats.outcomes == {"ok": 1} and stats.in_flight == 0
    flow = desk.recorder.flows["127.0.0.1:1", "127.0.0.1:2"]
    assert (flow.in_flight, flow.total) == (0, 1)
    record.end()
    assert stats.outcomes == {"ok": 1} and len(desk.event_log.records) == 1, "ended once"


def test_a_second_attempt_replaces_the_first(desk, world) -> None:
    prefills = [world.ready(Role.PREFILL, port) for port in (1, 3)]
    decode = world.ready(Role.DECODE, 2)
    record = desk.admitted()
    record.on_attempt(prefills[0], decode, "one")
    record.on_prefill_sent()
    desk.after(1)
    record.on_prefill_response()
    record.on_attempt(prefills[1], decode, "two")
    assert (record.prefill, record.public_id, record.tries) == (prefills[1].key, "two", 2)
    assert record.prefill_time is None, "that of the last attempt"
    flows = desk.recorder.flows
    assert [flows[p.key, decode.key].in_flight for p in prefills] == [0, 1]


def test_idle_flows_are_dropped_at_the_limit(desk, world, monkeypatch) -> None:
    monkeypatch.setattr("disagg_proxy.telemetry.request_recorder._MAX_FLOWS", 2)
    for port in range(2, 7):
        record = desk.admitted()
        record.on_attempt(None, world.ready(Role.DECODE, port), "x")
        if port > 2:
            record.end()
    assert len(desk.recorder.flows) <= 3 and desk.recorder.flows[None, "127.0.0.1:2"].in_flight == 1


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (BadRequest("x"), ("client_error", "invalid_request", 400)),
        (NoPair(["x"]), ("no_pair", "no_pair", 503)),
        (Overloaded("x"), ("turned_away", "overloaded", 429)),
        (EngineFailed("x"), ("engine_error", "engine_failed", 502)),
        (EngineFrozen("x"), ("deadline", "engine_frozen", 504)),
        (shutting_down(), ("unavailable", "service_unavailable", 503)),
        (ProxyError("x"), ("proxy_error", "internal_error", 500)),
    ],
)
def test_errors_have_an_outcome_and_a_cause(desk, error, outcome) -> None:
    record = desk.recorder.open("/v1/completions", None)
    record.fail(error)
    record.end()
    assert (record.outcome, record.cause, record.status) == outcome
    assert desk.recorder.stats.outcomes == {outcome[0]: 1} and desk.recorder.stats.in_flight == 0


def test_where_a_client_left(desk, world) -> None:
    in_queue = desk.recorder.open("/v1/completions", None)
    in_queue.on_ready("m")
    in_queue.waited = True
    desk.after(7)
    in_queue.end()
    assert (in_queue.cause, in_queue.queue_time) == ("in_queue", 7)
    before = desk.admitted()
    before.end()
    later = desk.admitted()
    later.on_first_byte(True)
    later.end()
    assert (before.cause, later.cause) == ("before_first_byte", "mid_stream")
    broken = desk.admitted()
    broken.on_first_byte(True)
    broken.cut(BROKEN)
    broken.cut()
    broken.end()
    assert (broken.outcome, broken.cause) == ("cut", "engine_disconnected")


def test_what_comes_after_the_end_changes_nothing(desk) -> None:
    record = desk.admitted()
    record.on_prefill_sent()
    record.end()
    record.on_prefill_response()
    assert record.prefill_done is None and record.outcome == "client_left"


def relay(desk, record, gaps: list[float]) -> None:
    """Relay a body of one more chunk than there are gaps."""
    record.on_first_byte(True)
    left = record.first_sample
    for gap in [0.0, *gaps]:
        desk.after(gap)
        left -= 1
        if not left:
            left = record.sample_gap()
    record.end_of_stream(left)


def test_every_gap_is_equally_likely_to_be_sampled(desk) -> None:
    measured: Counter[int] = Counter()
    for _ in range(GAP_SAMPLE_INTERVAL):
        record = desk.admitted()
        before = desk.recorder.stats.gap.count
        relay(desk, record, [float(n + 1) for n in range(40)])
        assert record.pieces == 41 and record.gaps == desk.recorder.stats.gap.count - before
        for seconds in list(desk.recorder.stats.gap.recent)[before:]:
            measured[round(seconds)] += 1
        record.complete()
        record.end()
    assert measured == {n + 1: 1 for n in range(40)}
    assert desk.recorder.timeseries.now.pieces == GAP_SAMPLE_INTERVAL * 41


def test_gaps_are_the_times_between_two_chunks(desk) -> None:
    record = desk.admitted()
    relay(desk, record, [0.5] * 100)
    record.complete()
    record.end()
    assert record.gaps in (3, 4) and record.gap_max == 0.5 and record.gap_sum == record.gaps * 0.5
    assert record.mean_gap == 0.5


def test_a_gap_during_which_the_client_did_not_read_is_not_counted(desk) -> None:
    record = desk.admitted()
    for _ in range(record.first_sample):
        left = record.sample_gap()
        if left == 1:
            break
    record.skip_gap()
    desk.after(1000)
    assert record.sample_gap() == 1, "the next gap is measured instead"
    desk.after(0.25)
    assert record.sample_gap() == GAP_SAMPLE_INTERVAL - 1
    assert (record.gaps, record.gap_sum) == (1, 0.25)


def test_a_body_without_chunks(desk) -> None:
    record = desk.admitted()
    record.end_of_stream(record.first_sample)
    record.end()
    assert record.pieces == 0 and record.mean_gap is None


def test_the_benchmark_of_its_cost_prints_figures(monkeypatch, capsys) -> None:
    monkeypatch.setattr(observe, "_ROUNDS", 1)
    observe.main()
    figures = [float(found) for found in re.findall(r"([\d.]+) µs", capsys.readouterr().out)]
    assert len(figures) == 4 and all(0 < figure < 100_000 for figure in figures)
