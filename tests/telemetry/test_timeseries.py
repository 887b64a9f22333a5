"""Steps of 5 s, and percentiles over them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.telemetry.timeseries import SECONDS, STEPS, LatencyHistogram, TimeSeries


@given(st.lists(st.floats(1e-5, 1e4), min_size=1), st.floats(0.01, 1.0))
def test_percentiles_are_right_to_within_5_percent(values: list[float], share: float) -> None:
    bins = LatencyHistogram()
    for value in values:
        bins.add(value)
    exact = sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]
    found = bins.quantile(share)
    assert found is not None and exact * 0.95 <= found <= exact * 1.05


def test_no_percentile_of_nothing_and_none_of_a_negative_time() -> None:
    bins = LatencyHistogram()
    assert bins.quantile(0.5) is None
    bins.add(-1.0)
    found = bins.quantile(0.5)
    assert found is not None and 0 < found < 1e-5


class Clock:
    def __init__(self) -> None:
        self.time = 1003.0

    def __call__(self) -> float:
        return self.time


def test_a_step_has_what_came_in_it_and_the_highest_that_was_seen() -> None:
    clock = Clock()
    timeseries = TimeSeries(clock)
    timeseries.now.outcomes["ok"] += 1
    timeseries.sample(3, 1, 10)
    timeseries.sample(2, 5, 7)
    clock.time = 1005.0
    timeseries.sample(1, 0, 0)
    timeseries.now.outcomes["cut"] += 1
    (first,), second = timeseries.past, timeseries.now
    assert (first.start, dict(first.outcomes)) == (1000, {"ok": 1})
    assert (first.in_flight, first.queued, first.kv_waiting_bytes) == (3, 5, 10)
    assert (second.start, dict(second.outcomes), second.in_flight) == (1005, {"cut": 1}, 1)


def test_no_more_than_ten_minutes_are_kept_and_a_successor_has_them_too() -> None:
    clock = Clock()
    timeseries = TimeSeries(clock)
    for number in range(200):
        timeseries.now.pieces = number
        clock.time += SECONDS
        timeseries.sample(0, 0, 0)
    assert [step.pieces for step in timeseries.past] == list(range(200 - STEPS + 1, 200))
    heir = TimeSeries(clock)
    heir.inherit([*timeseries.past, timeseries.now])
    assert [step.start for step in heir.past] == [step.start for step in timeseries.past], "its own step is another"
