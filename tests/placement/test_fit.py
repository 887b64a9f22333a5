"""What is learnt of an engine from its samples, and how fast it follows a change."""

from __future__ import annotations

import random

import pytest

from disagg_proxy.cluster.instance import Role
from disagg_proxy.placement.fit import ENOUGH, Fit
from disagg_proxy.placement.pace import Pace, View
from disagg_proxy.placement.trust import Trust
from tests.cluster.conftest import World

PER_TOKEN, FIXED = 15e-6, 0.008


def prefill_samples(pace: Pace, count: int, factor: float = 1.0, seed: int = 1) -> None:
    numbers = random.Random(seed)
    for _ in range(count):
        tokens, backlog = numbers.randrange(100, 4000), numbers.randrange(0, 8000)
        pace.add_prefill(factor * (FIXED + PER_TOKEN * (tokens + backlog)), tokens, backlog)


def view(pace: Pace, running: int) -> View:
    return View(World().ready(Role.DECODE, 1), pace, 0.0, 0, running)


def test_nothing_is_learnt_at_first() -> None:
    pace = Pace(Pace())
    assert not pace.learnt and pace.report()["prefill_tokens_per_second"] is None
    prefill_samples(pace, ENOUGH - 1)
    assert not pace.prefill.learnt
    prefill_samples(pace, 1)
    assert pace.prefill.learnt and pace.pool is not None and pace.pool.prefill.learnt and not pace.learnt


def test_a_line_through_samples_of_any_length() -> None:
    pace = Pace(Pace())
    prefill_samples(pace, 40)
    for tokens in (200, 2000, 20000):
        assert pace.prefill_seconds(tokens, 0) == pytest.approx(FIXED + PER_TOKEN * tokens, rel=0.05, abs=0.002)


def test_where_all_prompts_are_alike_the_line_goes_through_the_origin() -> None:
    fit = Fit(from_origin=True)
    for _ in range(20):
        fit.add(0.04, 2.0)
    assert fit.values() == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.02), 0.0)
    flat = Fit()
    for _ in range(20):
        flat.add(0.04, 2.0)
    assert flat.values()[0] == pytest.approx(0.04) and flat.values()[1] == pytest.approx(0.0, abs=1e-9)


def test_no_coefficient_is_negative() -> None:
    numbers = random.Random(3)
    fit = Fit()
    for _ in range(200):
        fit.add(numbers.random(), 10 * numbers.random(), numbers.random(), 0.01)
        assert min(fit.values()) >= 0.0


def test_a_step_has_parts_for_the_batch_and_for_prompts() -> None:
    pace, numbers = Pace(Pace()), random.Random(5)
    prefill_samples(pace, 20)
    for _ in range(60):
        running, tokens = numbers.randrange(1, 40), 200 * numbers.random()
        pace.add_step(0.004 + 45e-6 * running + PER_TOKEN * tokens, running, tokens)
    assert pace.step.values() == (
        pytest.approx(0.004, rel=0.1), pytest.approx(45e-6, rel=0.1), pytest.approx(PER_TOKEN * 1000, rel=0.1),
    )  # fmt: skip
    assert view(pace, 10).token_seconds(10, 20.0) == pytest.approx(0.00445 / (1 - 0.3), rel=0.1)


def test_without_prompts_between_steps_the_pace_of_prefill_counts() -> None:
    pace = Pace(Pace())
    prefill_samples(pace, 20)
    for running in range(1, 20):
        pace.add_step(0.004 + 45e-6 * running, running, 0.0)
    assert pace.step.values()[2] == pytest.approx(pace.prefill.values()[1])


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_a_change_of_the_pace_is_learnt(factor: float) -> None:
    pace = Pace(Pace())
    prefill_samples(pace, 100)
    prefill_samples(pace, 60, factor, seed=2)
    assert pace.prefill_seconds(2000, 0) == pytest.approx(factor * (FIXED + PER_TOKEN * 2000), rel=0.12)


def test_an_engine_starts_from_the_pool_and_has_its_own_pace_then() -> None:
    pool = Pace()
    first, second = Pace(pool), Pace(pool)
    prefill_samples(first, 40)
    assert second.prefill.learnt
    assert second.prefill_seconds(2000, 0) == pytest.approx(FIXED + PER_TOKEN * 2000, rel=0.05)
    prefill_samples(second, 40, factor=1.3)
    assert second.prefill_seconds(2000, 0) == pytest.approx(1.3 * (FIXED + PER_TOKEN * 2000), rel=0.1)
    assert first.prefill_seconds(2000, 0) == pytest.approx(FIXED + PER_TOKEN * 2000, rel=0.1)


def test_the_rate_of_prompts_decays() -> None:
    pace = Pace()
    for now in range(100):
        pace.assign(now / 10, 2000)
    assert pace.rate(9.9) == pytest.approx(20.0, rel=0.1)
    assert pace.rate(13.9) == pytest.approx(20.0 / 2.718, rel=0.1)
    pace.assign(20.0, 20_000)
    assert pace.rate(20.0) == pytest.approx(21.6, rel=0.1), "a burst counts at once"


def test_the_handover_is_a_mean() -> None:
    pace = Pace(Pace())
    for _ in range(ENOUGH):
        pace.add_handover(0.01)
    assert pace.handover == pytest.approx(0.01) and Pace(pace.pool).handover == pytest.approx(0.01)


def test_trust_is_lost_when_predictions_are_wrong_for_a_while_and_comes_back() -> None:
    trust = Trust()
    assert not any(trust.add(0.1, 0.5) for _ in range(23)), "a few wrong ones say nothing"
    assert trust.add(0.1, 0.5) and not trust.given
    changes = [trust.add(0.1, 0.11) for _ in range(40)]
    assert changes.count(True) == 1 and trust.given


def test_errors_of_a_third_are_trusted() -> None:
    trust = Trust()
    for number in range(500):
        assert not trust.add(0.1, 0.13 if number % 2 else 0.075)
    assert trust.given and not trust.add(0.0, 0.0)
