"""What fits into the time. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST, MOST = 2.5, 12.0
"""Seconds of arrivals in one window, at least and at most."""


@dataclass(frozen=True)
class Window:
    """One rate on one arm."""

    round: int
    rate: float
    arm: str


def windows(rounds: int, rates: Sequence[float], arms: Sequence[str]) -> list[list[Window]]:
    """The windows of each round: rates ascending, each arm in turn the first one, so that drift affects all alike."""
    found = []
    for number in range(rounds):
        turned = [*arms[number % len(arms) :], *arms[: number % len(arms)]]
        found.append([Window(number + 1, rate, arm) for rate in rates for arm in turned])
    return found


def seconds_for(left: float, rounds_left: int, per_round: int, overhead: float) -> float:
    """Seconds of arrivals in each window of the next round; 0 when the time does not suffice for it.

    Args:
        left: seconds that there are for all rounds that are left.
        overhead: seconds that a window takes beside its arrivals.
    """
    for rounds in range(rounds_left, 0, -1):
        share = left / (rounds * per_round) - overhead
        if share >= LEAST:
            return min(MOST, share)
    return 0.0
