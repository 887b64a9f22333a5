"""From requests to figures."""

from __future__ import annotations

import pytest

from disagg_report.figures import figures, percentile, saturated
from disagg_report.records import Measurement, Shot
from tests.report.make import POWER, SLO, measured, shot


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(one) for one in range(1, 101)]
    assert percentile(values, 0.5) == 50 and percentile(values, 0.99) == 99
    assert percentile([3.0], 0.99) == 3.0 and percentile([], 0.5) is None
    assert percentile([2.0, 1.0], 0.5) == 1.0


def test_a_request_is_good_when_both_times_are_kept_and_it_was_answered() -> None:
    assert SLO.good(shot(ttft=100, tpot=20))
    assert not SLO.good(shot(ttft=100.1))
    assert not SLO.good(shot(tpot=20.1))
    assert not SLO.good(Shot(error="HTTP 500"))
    assert not SLO.good(shot(error="cut"))
    assert SLO.good(shot(tokens=1, tpot=0))  # no further tokens that could be late


def test_one_slow_token_is_no_slow_answer() -> None:
    one = shot(itl_ms=(1.0, 1.0, 1.0, 70.0), latency_ms=50.0 + 73.0)
    assert one.tpot_ms == pytest.approx(18.25) and SLO.good(one)


def test_goodput_is_the_rate_times_the_share_of_good_requests() -> None:
    found = figures(measured(10, good=80, bad=20, power=POWER), SLO)
    assert (found.sent, found.answered, found.good) == (100, 100, 80)
    assert found.goodput == pytest.approx(8.0) and not found.kept
    assert found.throughput == pytest.approx(100 / 10.1)
    assert found.ttft_ms == (50.0, 500.0) and found.itl_ms == (10.0, 10.0)
    assert found.joules_per_token["prefill"] == pytest.approx(4000 / 500)


def test_failed_requests_count_against_the_slo_and_are_named() -> None:
    shots = (*(shot() for _ in range(18)), Shot(error="HTTP 503: no pair"), Shot(error="HTTP 503: no pair"))
    found = figures(Measurement(2, 10, shots), SLO)
    assert found.share == 0.9 and found.kept and found.answered == 18
    assert found.errors == ("HTTP 503: no pair",)


def test_nothing_answered_is_no_crash() -> None:
    found = figures(Measurement(2, 10, (Shot(error="x"),), power=POWER), SLO)
    assert found.goodput == 0 and found.ttft_ms == (None, None) and found.joules_per_token == {}


def test_answers_that_fall_behind_saturate() -> None:
    keeping = Measurement(10, 11, tuple(shot(sent=at / 10, ttft=500, tpot=0) for at in range(100)))
    assert not saturated(keeping, 500.0)
    behind = Measurement(10, 30, tuple(shot(sent=at / 10, ttft=500 + at * 200, tpot=0) for at in range(100)))
    assert saturated(behind, 500.0)
    assert not saturated(behind, None)


def test_without_sending_times_saturation_is_unknown() -> None:
    unknown = Measurement(10, 99, tuple(shot(sent=None, ttft=50_000) for _ in range(100)))
    assert not saturated(unknown, 500.0)


def test_a_few_requests_that_come_late_do_not_look_saturated() -> None:
    late = (0.0, 0.4, 2.9, 3.1, 3.2, 3.3, 3.35, 3.4, 3.5, 3.6, 3.7, 3.8, 4.0)
    assert not saturated(Measurement(4, 6, tuple(shot(sent=at, ttft=1500, tpot=0) for at in late)), 1400.0)
