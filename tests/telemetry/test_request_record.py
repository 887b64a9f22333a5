"""One request's times, its end, and the sampling of its gaps."""

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
from disagg_proxy.telemetry.request_record import EVERY

BROKEN = EngineDisconnected("broken", unsent=False, reused=False)


def test_times_of_a_streamed_request(desk, world) -> None:
    prefill, decode = world.ready(Role.PREFILL, 1, "m"), world.ready(Role.DECODE, 2, "m")
    record = desk.recorder.open("/v1/completions", "mine")
    for seconds, step in (
        (1, lambda: record.asks(None)), (2, record.admit), (0, lambda: record.put_on(prefill, decode, "id")),
        (0, record.ask_prefill), (3, record.answer_prefill), (0, record.ask_decode),
        (4, lambda: record.begin_answer(True)),
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


def test_a_second_try_takes_the_first_ones_place(desk, world) -> None:
    prefills = [world.ready(Role.PREFILL, port) for port in (1, 3)]
    decode = world.ready(Role.DECODE, 2)
    record = desk.admitted()
    record.put_on(prefills[0], decode, "one")
    record.ask_prefill()
    desk.after(1)
    record.answer_prefill()
    record.put_on(prefills[1], decode, "two")
    assert (record.prefill, record.public_id, record.tries) == (prefills[1].key, "two", 2)
    assert record.prefill_time is None, "that of the last try"
    flows = desk.recorder.flows
    assert [flows[p.key, decode.key].in_flight for p in prefills] == [0, 1]


def test_flows_that_rest_make_room(desk, world, monkeypatch) -> None:
    monkeypatch.setattr("disagg_proxy.telemetry.request_recorder._MOST_FLOWS", 2)
    for port in range(2, 7):
        record = desk.admitted()
        record.put_on(None, world.ready(Role.DECODE, port), "x")
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
    in_queue.asks("m")
    in_queue.waited = True
    desk.after(7)
    in_queue.end()
    assert (in_queue.cause, in_queue.queue_time) == ("in_queue", 7)
    before = desk.admitted()
    before.end()
    later = desk.admitted()
    later.begin_answer(True)
    later.end()
    assert (before.cause, later.cause) == ("before_first_byte", "mid_stream")
    broken = desk.admitted()
    broken.begin_answer(True)
    broken.cut(BROKEN)
    broken.cut()
    broken.end()
    assert (broken.outcome, broken.cause) == ("cut", "engine_disconnected")


def test_what_comes_after_the_end_changes_nothing(desk) -> None:
    record = desk.admitted()
    record.ask_prefill()
    record.end()
    record.answer_prefill()
    assert record.prefill_answered is None and record.outcome == "client_left"


def passing(desk, record, gaps: list[float]) -> None:
    """Let a body of one more piece than gaps pass."""
    record.begin_answer(True)
    left = record.first_look
    for gap in [0.0, *gaps]:
        desk.after(gap)
        left -= 1
        if not left:
            left = record.look()
    record.passed(left)


def test_every_gap_has_the_same_chance(desk) -> None:
    measured: Counter[int] = Counter()
    for _ in range(EVERY):
        record = desk.admitted()
        before = desk.recorder.stats.gap.count
        passing(desk, record, [float(n + 1) for n in range(40)])
        assert record.pieces == 41 and record.gaps == desk.recorder.stats.gap.count - before
        for seconds in list(desk.recorder.stats.gap.recent)[before:]:
            measured[round(seconds)] += 1
        record.complete()
        record.end()
    assert measured == {n + 1: 1 for n in range(40)}
    assert desk.recorder.timeseries.now.pieces == EVERY * 41


def test_gaps_are_what_lay_between_two_pieces(desk) -> None:
    record = desk.admitted()
    passing(desk, record, [0.5] * 100)
    record.complete()
    record.end()
    assert record.gaps in (3, 4) and record.gap_max == 0.5 and record.gap_sum == record.gaps * 0.5
    assert record.mean_gap == 0.5


def test_a_gap_in_which_the_client_took_nothing_is_left_out(desk) -> None:
    record = desk.admitted()
    for _ in range(record.first_look):
        left = record.look()
        if left == 1:
            break
    record.disturbed()
    desk.after(1000)
    assert record.look() == 1, "the next gap is measured instead"
    desk.after(0.25)
    assert record.look() == EVERY - 1
    assert (record.gaps, record.gap_sum) == (1, 0.25)


def test_a_body_without_pieces(desk) -> None:
    record = desk.admitted()
    record.passed(record.first_look)
    record.end()
    assert record.pieces == 0 and record.mean_gap is None


def test_the_measurement_of_its_cost_measures(monkeypatch, capsys) -> None:
    monkeypatch.setattr(observe, "_ROUNDS", 1)
    observe.main()
    figures = [float(found) for found in re.findall(r"([\d.]+) µs", capsys.readouterr().out)]
    assert len(figures) == 4 and all(0 < figure < 100_000 for figure in figures)
