"""Progress of an engine, and the deadlines that are learnt from it."""

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


def test_with_few_samples_the_longest_deadline_applies() -> None:
    baseline = LatencyBaseline()
    for _ in range(7):
        baseline.add(0.1, 0)
    assert baseline.deadline(0, 20, 300) == 300
    baseline.add(0.1, 0)
    assert baseline.deadline(0, 20, 300) == 20


@pytest.mark.parametrize(("slowest", "deadline"), [(0.1, 20), (10, 50), (100, 300)])
def test_the_slowest_recent_answers_decide_within_the_bounds(slowest: float, deadline: float) -> None:
    baseline = LatencyBaseline()
    for _ in range(50):
        baseline.add(0.05, 0)
    baseline.add(slowest, 0)
    assert baseline.deadline(0, 20, 300) == deadline


def test_old_answers_are_forgotten() -> None:
    baseline = LatencyBaseline()
    baseline.add(100.0, 0)
    for _ in range(256):
        baseline.add(0.05, 0)
    assert baseline.deadline(0, 1, 300) == 1


def test_a_long_prompt_gets_the_time_that_its_length_takes() -> None:
    baseline = LatencyBaseline()
    for _ in range(20):
        baseline.add(0.5, 1000)
    assert baseline.deadline(1000, 1, 300) == 2.5
    assert baseline.deadline(100_000, 1, 300) == 250


def test_short_prompts_do_not_determine_the_deadline_of_long_ones() -> None:
    baseline = LatencyBaseline()
    for _ in range(20):
        baseline.add(0.05, 1)
    assert baseline.deadline(100_000, 1, 300) == pytest.approx(5 * 0.05 / 512 * 100_000)


def test_the_oldest_wait_counts_from_the_last_output() -> None:
    clock = Clock()
    progress = ProgressTracker(clock())
    assert progress.stalled_for(clock()) == 0.0
    first = begin(progress, clock)
    clock.now += 5
    second = begin(progress, clock)
    assert progress.stalled_for(clock()) == 5
    second.on_data()
    clock.now += 1
    assert progress.poll(clock()) and progress.stalled_for(clock()) == 0
    clock.now += 3
    assert not progress.poll(clock()) and progress.stalled_for(clock()) == 3
    first.end()
    assert progress.stalled_for(clock()) == 0, "the other one waits for its client"
    second.resume_wait()
    assert progress.stalled_for(clock()) == 3


def test_only_legs_that_expect_output_count_for_the_baseline() -> None:
    clock = Clock()
    progress = ProgressTracker(clock())
    for _ in range(10):
        pending = begin(progress, clock, expects_output=False)
        clock.now += 50
        pending.on_data()
        pending.end()
    assert progress.deadline(20, 300) == 300
    for _ in range(8):
        pending = begin(progress, clock)
        clock.now += 0.1
        pending.on_data()
        clock.now += 90
        pending.on_data()
        pending.end()
    assert progress.deadline(20, 300) == 20, "later chunks do not count"


def test_replay_candidates_are_sorted_by_distance_to_the_last_output() -> None:
    clock = Clock()
    progress = ProgressTracker(clock())
    old = begin(progress, clock, replay=replay)
    clock.now += 10
    moving = begin(progress, clock, replay=replay)
    moving.on_data()
    progress.poll(clock())
    near = begin(progress, clock, replay=replay)
    clock.now += 4
    later = begin(progress, clock, replay=replay)
    begin(progress, clock)
    assert progress.replay_candidates() == [near, later, old]


def test_abandoned_legs_are_kept_until_the_next_output() -> None:
    clock = Clock()
    progress = ProgressTracker(clock())
    gone = begin(progress, clock, replay=replay)
    refused = begin(progress, clock, replay=replay)
    answered = begin(progress, clock, replay=replay)
    gone.end()
    gone.end()
    refused.end(received=False)
    assert progress.replay_candidates() == [gone, answered]
    answered.on_data()
    answered.end()
    assert progress.replay_candidates() == [gone]
    progress.poll(clock())
    assert progress.replay_candidates() == [] and not progress.pending


def test_abandoned_legs_are_bounded() -> None:
    clock = Clock()
    progress = ProgressTracker(clock())
    for _ in range(100):
        begin(progress, clock, replay=replay, size=100).end()
    assert len(progress.abandoned) == 16
    large = ProgressTracker(clock())
    for _ in range(4):
        begin(large, clock, replay=replay, size=7 * 1024 * 1024).end()
    assert len(large.abandoned) == 2
