"""What the proxy sees of an engine at work."""

from __future__ import annotations

import pytest

from disagg_proxy.cluster.pulse import Pace, Pulse


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def begin(pulse: Pulse, clock: Clock, **options):
    return pulse.begin(clock, **options)


async def replay() -> bool:
    return True


def test_with_little_known_the_longest_deadline_holds() -> None:
    pace = Pace()
    for _ in range(7):
        pace.add(0.1, 0)
    assert pace.deadline(0, 20, 300) == 300
    pace.add(0.1, 0)
    assert pace.deadline(0, 20, 300) == 20


@pytest.mark.parametrize(("slowest", "deadline"), [(0.1, 20), (10, 50), (100, 300)])
def test_the_slowest_recent_answers_decide_within_the_bounds(slowest: float, deadline: float) -> None:
    pace = Pace()
    for _ in range(50):
        pace.add(0.05, 0)
    pace.add(slowest, 0)
    assert pace.deadline(0, 20, 300) == deadline


def test_old_answers_are_forgotten() -> None:
    pace = Pace()
    pace.add(100.0, 0)
    for _ in range(256):
        pace.add(0.05, 0)
    assert pace.deadline(0, 1, 300) == 1


def test_a_long_prompt_gets_the_time_that_its_length_takes() -> None:
    pace = Pace()
    for _ in range(20):
        pace.add(0.5, 1000)
    assert pace.deadline(1000, 1, 300) == 2.5
    assert pace.deadline(100_000, 1, 300) == 250


def test_a_short_prompt_says_little_about_long_ones() -> None:
    pace = Pace()
    for _ in range(20):
        pace.add(0.05, 1)
    assert pace.deadline(100_000, 1, 300) == pytest.approx(5 * 0.05 / 512 * 100_000)


def test_the_silence_of_the_longest_wait_counts_from_the_last_move() -> None:
    clock = Clock()
    pulse = Pulse(clock())
    assert pulse.silent_for(clock()) == 0.0
    first = begin(pulse, clock)
    clock.now += 5
    second = begin(pulse, clock)
    assert pulse.silent_for(clock()) == 5
    second.heard()
    clock.now += 1
    assert pulse.look(clock()) and pulse.silent_for(clock()) == 0
    clock.now += 3
    assert not pulse.look(clock()) and pulse.silent_for(clock()) == 3
    first.end()
    assert pulse.silent_for(clock()) == 0, "the other one waits for its client"
    second.listen()
    assert pulse.silent_for(clock()) == 3


def test_only_what_is_due_to_say_something_teaches_the_pace() -> None:
    clock = Clock()
    pulse = Pulse(clock())
    for _ in range(10):
        vigil = begin(pulse, clock, telling=False)
        clock.now += 50
        vigil.heard()
        vigil.end()
    assert pulse.deadline(20, 300) == 300
    for _ in range(8):
        vigil = begin(pulse, clock)
        clock.now += 0.1
        vigil.heard()
        clock.now += 90
        vigil.heard()
        vigil.end()
    assert pulse.deadline(20, 300) == 20, "later pieces teach nothing"


def test_unanswered_decodes_come_nearest_to_the_last_move_first() -> None:
    clock = Clock()
    pulse = Pulse(clock())
    old = begin(pulse, clock, replay=replay)
    clock.now += 10
    moving = begin(pulse, clock, replay=replay)
    moving.heard()
    pulse.look(clock())
    near = begin(pulse, clock, replay=replay)
    clock.now += 4
    later = begin(pulse, clock, replay=replay)
    begin(pulse, clock)
    assert pulse.unanswered() == [near, later, old]


def test_what_was_given_up_unanswered_is_remembered_until_the_engine_moves() -> None:
    clock = Clock()
    pulse = Pulse(clock())
    gone = begin(pulse, clock, replay=replay)
    refused = begin(pulse, clock, replay=replay)
    answered = begin(pulse, clock, replay=replay)
    gone.end()
    gone.end()
    refused.end(received=False)
    assert pulse.unanswered() == [gone, answered]
    answered.heard()
    answered.end()
    assert pulse.unanswered() == [gone]
    pulse.look(clock())
    assert pulse.unanswered() == [] and not pulse.open


def test_what_is_remembered_is_bounded() -> None:
    clock = Clock()
    pulse = Pulse(clock())
    for _ in range(100):
        begin(pulse, clock, replay=replay, size=100).end()
    assert len(pulse.left) == 16
    large = Pulse(clock())
    for _ in range(4):
        begin(large, clock, replay=replay, size=7 * 1024 * 1024).end()
    assert len(large.left) == 2
