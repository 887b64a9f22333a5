"""Which rate comes next."""

from __future__ import annotations

import pytest

from disagg_report.rates import HIGHEST, LOWEST, Ended, Tried, next_rate, rounded


def sweep(limit: float) -> tuple[list[float], Ended]:
    """The rates that are tried when everything up to ``limit`` holds."""
    tried: list[Tried] = []
    while not isinstance(rate := next_rate(tried), Ended):
        tried.append(Tried(rate, rate <= limit))
    return [one.rate for one in tried], rate


def test_doubles_until_it_breaks_and_then_looks_between() -> None:
    assert sweep(10.0) == ([1, 2, 4, 8, 16, 11, 9.4], Ended.FOUND)


@pytest.mark.parametrize("limit", [0.13, 0.3, 0.99, 1.0, 3.7, 57.0, 1000.0])
def test_the_limit_is_known_to_a_quarter(limit: float) -> None:
    rates, why = sweep(limit)
    assert why is Ended.FOUND
    assert min(rate for rate in rates if rate > limit) / max(rate for rate in rates if rate <= limit) <= 1.3


def test_goes_down_when_the_first_breaks_and_gives_up_at_the_lowest() -> None:
    assert sweep(0.01) == ([1, 0.5, 0.25, LOWEST], Ended.NOTHING_KEPT)


def test_gives_up_at_the_highest() -> None:
    rates, why = sweep(1e9)
    assert why is Ended.HIGHEST and rates[-1] == HIGHEST


def test_a_rate_that_holds_above_one_that_broke_does_not_count() -> None:
    tried = [Tried(1, True), Tried(2, False), Tried(4, True)]
    assert next_rate(tried) == 1.4


def test_a_list_is_followed_whatever_happens() -> None:
    assert next_rate([], [3, 1, 2]) == 3
    assert next_rate([Tried(3, False)], [3, 1, 2]) == 1
    assert next_rate([Tried(3, False)] * 3, [3, 1, 2]) is Ended.LIST


def test_rounded_to_two_digits() -> None:
    assert [rounded(rate) for rate in (0.1768, 1.414, 11.31, 362.0)] == [0.18, 1.4, 11, 360]
