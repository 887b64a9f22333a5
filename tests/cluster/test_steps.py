"""When an engine is suspected: the time without a change, compared with its recent steps."""

from __future__ import annotations

import random

import pytest

from disagg_proxy.cluster.steps import MIN_SUSPECT_SECONDS, StepClock


def observed(clock: StepClock, changes: list[float], until: float, pauses: tuple[tuple[float, float], ...] = ()) -> int:
    """Observe a busy engine that changes at these times once a second, but for ``pauses``; how often it is suspect."""
    suspicions, suspect, done, now = 0, False, 0, 0.0
    while now < until:
        pause = next((end for begin, end in pauses if begin <= now < end), None)
        now = now + 1.0 if pause is None else pause
        changed = done < len(changes) and changes[done] <= now
        while done < len(changes) and changes[done] <= now:
            done += 1
        clock.observe(now, owes=True, changed=changed)
        limit = clock.limit(0.0)
        is_suspect = limit is not None and clock.idle > limit
        suspicions += is_suspect and not suspect
        suspect = is_suspect
    return suspicions


def ticks(step: float, count: int, jitter: float = 0.0, seed: int = 0) -> list[float]:
    rng, at, found = random.Random(seed), 0.0, []
    for _ in range(count):
        at += step * (1.0 + rng.uniform(-jitter, jitter))
        found.append(at)
    return found


@pytest.mark.parametrize("step", [0.05, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 60.0])
def test_steps_of_any_length_are_not_suspected(step: float) -> None:
    for seed in range(20):
        changes = ticks(step, 60, jitter=0.5, seed=seed)
        assert observed(StepClock(), changes, changes[-1]) == 0


@pytest.mark.parametrize("step", [0.05, 1.0, 10.0])
def test_a_stall_is_suspected_after_five_steps_or_three_seconds(step: float) -> None:
    changes = ticks(step, 200)
    clock = StepClock()
    assert observed(clock, changes, changes[-1] + 1.0) == 0
    limit = max(MIN_SUSPECT_SECONDS, 5 * step)
    assert observed(StepClock(), changes, changes[-1] + limit + 6.0) == 1


def test_a_longer_step_than_any_before_is_learnt_when_it_comes_again() -> None:
    short, at, changes = ticks(0.1, 100), 10.0, []
    for _ in range(6):
        at += 30.0
        changes.append(at)
    assert observed(StepClock(), short + changes, at) == 2


def test_a_pause_of_the_host_is_no_time_without_a_change() -> None:
    changes = ticks(0.1, 300)
    assert observed(StepClock(), [*changes, 90.5], 91.0, pauses=((30.0, 90.0),)) == 0


def test_an_engine_that_owes_nothing_is_not_idle() -> None:
    clock = StepClock()
    for now in range(5):
        clock.observe(now, owes=True, changed=True)
    for now in range(5, 100):
        clock.observe(now, owes=False, changed=False)
    clock.observe(100.0, owes=True, changed=False)
    assert clock.idle == 0.0


def test_nothing_is_suspected_before_some_steps_are_known() -> None:
    clock = StepClock()
    for now in range(100):
        clock.observe(now, owes=True, changed=now in (1, 2))
    assert clock.idle > 90.0 and clock.limit(0.0) is None


def test_the_time_to_compute_the_waiting_prompts_counts() -> None:
    clock = StepClock()
    for now in range(5):
        clock.observe(now, owes=True, changed=True)
    assert clock.limit(0.0) == MIN_SUSPECT_SECONDS and clock.limit(8.0) == 40.0
