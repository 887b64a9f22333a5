"""What the proxy sees of an engine at work."""

from __future__ import annotations

import pytest

from disagg_proxy.cluster.progress import LatencyBaseline, ProgressTracker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def begin(progress: ProgressTracker, clock: Clock, **options):
    return progress.begin(clock, **options)


async def replay() -> bool:
    return True


def test_with_little_known_the_longest_deadline_holds() -> None:
    pace = LatencyBaseline()
    for _ in range(7):
        pace.add(0.1, 0)
    assert pace.deadline(0, 20, 300) == 300
    pace.add(0.1, 0)
    assert pace.deadline(0, 20, 300) == 20


@pytest.mark.parametrize(("slowest", "deadline"), [(0.1, 20), (10, 50), (100, 300)])
def test_the_slowest_recent_answers_decide_within_the_bounds(slowest: float, deadline: float) -> None:
    pace = LatencyBaseline()
    for _ in range(50):
        pace.add(0.05, 0)
    pace.add(slowest, 0)
    assert pace.deadline(0, 20, 300) == deadline


def test_old_answers_are_forgotten() -> None:
    pace = LatencyBaseline()
    pace.add(100.0, 0)
    for _ in range(256):
        pace.add(0.05, 0)
    assert pace.deadline(0, 1, 300) == 1


def test_a_long_prompt_gets_the_time_that_its_length_takes() -> None:
    pace = LatencyBaseline()
    for _ in range(20):
        pace.add(0.5, 1000)
    assert pace.deadline(1000, 1, 300) == 2.5
    assert pace.deadline(100_000, 1, 300) == 250


def test_a_short_prompt_says_little_about_long_ones() -> None:
    pace = LatencyBaseline()
    for _ in range(20):
        pace.add(0.05, 1)
    assert pace.deadline(100_000, 1, 300) == pytest.approx(5 * 0.05 / 512 * 100_000)


def test_the_silence_of_the_longest_wait_counts_from_the_last_move() -> None:
    clock = Clock()
    progress = ProgressTracker(clock())
    assert progress.stalled_for(clock()) == 0.0
    first = begin(progress, clock)
    clock.now += 5
    second = begin(progress, clock)
    assert progress.stalled_for(clock()) == 5
    second.heard()
    clock.now += 1
    assert progress.look(clock()) and progress.stalled_for(clock()) == 0
    clock.now += 3
    assert not progress.look(clock()) and progress.stalled_for(clock()) == 3
    first.end()
    assert progress.stalled_for(clock()) == 0, "the other one waits for its client"
    second.listen()
    assert progress.stalled_for(clock()) == 3


def test_only_what_is_due_to_say_something_teaches_the_pace() -> None:
    clock = Clock()
    progress = ProgressTracker(clock())
    for _ in range(10):
        pending = begin(progress, clock, telling=False)
        clock.now += 50
        pending.heard()
        pending.end()
    assert progress.deadline(20, 300) == 300
    for _ in range(8):
        pending = begin(progress, clock)
        clock.now += 0.1
        pending.heard()
        clock.now += 90
        pending.heard()
        pending.end()
    assert progress.deadline(20, 300) == 20, "later pieces teach nothing"


def test_unanswered_decodes_come_nearest_to_the_last_move_first() -> None:
    clock = Clock()
    progress = ProgressTracker(clock())
    old = begin(progress, clock, replay=replay)
    clock.now += 10
    moving = begin(progress, clock, replay=replay)
    moving.heard()
    progress.look(clock())
    near = begin(progress, clock, replay=replay)
    clock.now += 4
    later = begin(progress, clock, replay=replay)
    begin(progress, clock)
    assert progress.unanswered() == [near, later, old]


def test_what_was_given_up_unanswered_is_remembered_until_the_engine_moves() -> None:
    clock = Clock()
    progress = ProgressTracker(clock())
    gone = begin(progress, clock, replay=replay)
    refused = begin(progress, clock, replay=replay)
    answered = begin(progress, clock, replay=replay)
    gone.end()
    gone.end()
    refused.end(received=False)
    assert progress.unanswered() == [gone, answered]
    answered.heard()
    answered.end()
    assert progress.unanswered() == [gone]
    progress.look(clock())
    assert progress.unanswered() == [] and not progress.open


def test_what_is_remembered_is_bounded() -> None:
    clock = Clock()
    progress = ProgressTracker(clock())
    for _ in range(100):
        begin(progress, clock, replay=replay, size=100).end()
    assert len(progress.left) == 16
    large = ProgressTracker(clock())
    for _ in range(4):
        begin(large, clock, replay=replay, size=7 * 1024 * 1024).end()
    assert len(large.left) == 2
