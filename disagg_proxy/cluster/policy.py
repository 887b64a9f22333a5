"""How one instance is chosen among equals: pure functions, no clock, no I/O, no randomness.

A policy sees the candidates (never none) and a running number, and returns an index. Prefill and decode each have
their own policy and are chosen independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Loaded(Protocol):
    """What a policy may look at."""

    @property
    def in_flight(self) -> int: ...


class Policy(Protocol):
    """``turn`` counts choices and gives ties and rounds their order."""

    def __call__(self, candidates: Sequence[Loaded], turn: int) -> int: ...


def round_robin(candidates: Sequence[Loaded], turn: int) -> int:
    """Each in turn."""
    return turn % len(candidates)


def least_loaded(candidates: Sequence[Loaded], turn: int) -> int:
    """The one with the fewest requests in flight; equals take turns."""
    count = len(candidates)
    return min(range(count), key=lambda i: (candidates[i].in_flight, (i - turn) % count))


POLICIES: dict[str, Policy] = {"round_robin": round_robin, "least_loaded": least_loaded}
