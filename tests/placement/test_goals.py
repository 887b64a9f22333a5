"""What a way to serve a request costs, with an SLO and without one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from disagg_proxy.placement.goals import Goals, Outlook, cost, missed

SLO = Goals(0.4, 0.010)
IDLE = Outlook(0.05, 0.005, 0.0, 0.0, 128, 0.0, 0, 0.0, 0.0)


@pytest.mark.parametrize(("seconds", "expected"), [(0.1, 0.0), (0.34, 0.0), (0.38, 0.5), (0.42, 1.0), (9.0, 1.0)])
def test_missed(seconds: float, expected: float) -> None:
    assert missed(seconds, 0.4) == pytest.approx(expected)
    assert missed(seconds, 0.0) == 0.0


def test_a_wide_spread_misses_earlier() -> None:
    assert missed(0.3, 0.4) == 0.0 < missed(0.3, 0.4, 0.1) < missed(0.3, 0.4, 0.4) < 0.5


def test_answers_on_a_prefill_are_a_risk_where_prompts_are_many() -> None:
    """They are the sooner, and still kept away, before they are too slow."""
    alone = replace(IDLE, ttft=0.045, shared=0.005)
    assert cost(SLO, alone) < cost(SLO, replace(IDLE, ttft=0.06))
    assert cost(SLO, replace(alone, shared=0.008)) > cost(SLO, replace(IDLE, ttft=0.06))


def test_without_an_slo_the_delay_of_others_counts() -> None:
    alone = replace(IDLE, ttft=0.045, delay=30 * 0.03)
    split = replace(IDLE, ttft=0.06)
    assert cost(Goals(), split) < cost(Goals(), alone)
    assert cost(Goals(), replace(alone, delay=0.01)) < cost(Goals(), split)
    assert cost(Goals(), replace(split, ttft=1.2)) > cost(Goals(), alone), "a long queue is worse than the delay"


def test_with_an_slo_what_all_meet_is_decided_by_the_first_token() -> None:
    alone = replace(IDLE, ttft=0.045, delay=0.9, sharing=30, tpot_before=0.006, tpot_after=0.0065)
    assert cost(SLO, alone) < cost(SLO, replace(IDLE, ttft=0.06))


def test_others_that_would_miss_it_count_each() -> None:
    alone = replace(IDLE, sharing=30, tpot_before=0.0085, tpot_after=0.009)
    late = replace(IDLE, ttft=2.0)
    assert cost(SLO, alone) > cost(SLO, late), "one that misses is better than several"
    assert cost(SLO, replace(alone, sharing=1)) < cost(SLO, late)


def test_only_a_limit_on_the_first_token() -> None:
    goals = Goals(ttft=0.4)
    assert cost(goals, replace(IDLE, tpot=0.05)) > cost(goals, IDLE)
    assert cost(goals, replace(IDLE, ttft=1.0)) > cost(goals, replace(IDLE, tpot=0.02))


def test_only_a_limit_on_the_time_between_tokens() -> None:
    goals = Goals(tpot=0.010)
    assert cost(goals, replace(IDLE, tpot=0.02)) > cost(goals, replace(IDLE, ttft=1.0))
