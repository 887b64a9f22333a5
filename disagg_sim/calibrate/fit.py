"""The profile's figures from measured times. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prefill:
    """Time to the first token: ``fixed + tokens x token x (1 + tokens / (2 x context))``; ``context`` 0: without it."""

    fixed: float
    token: float
    context: float


@dataclass(frozen=True, slots=True)
class Decode:
    """Time of a step: ``fixed + sequences x sequence + tokens of context x context``."""

    fixed: float
    sequence: float
    context: float


@dataclass(frozen=True, slots=True)
class HandOver:
    """Time from the end of prefill to decode's first step: ``fixed + tokens / speed``."""

    fixed: float
    speed: float


NO_SPEED_LIMIT = 1e9
"""Tokens per second of a hand-over whose time does not grow with the prompt."""


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Coefficients, none below 0, with the least relative squared error; values are above 0.

    Terms that are not determined, and then the one that would be most negative, are left out until none is.
    """
    used = list(range(len(rows[0])))
    while used:
        scaled = [[row[at] / value for at in used] for row, value in zip(rows, values, strict=True)]
        found = _solve(scaled)
        if isinstance(found, int):
            used.pop(found)
            continue
        if min(found) >= 0:
            result = [0.0] * len(rows[0])
            for at, value in zip(used, found, strict=True):
                result[at] = value
            return result
        used.pop(found.index(min(found)))
    return [0.0] * len(rows[0])


def _solve(rows: Sequence[Sequence[float]]) -> list[float] | int:
    """Coefficients for which the rows come closest to 1, or the first one that is not determined."""
    size = len(rows[0])
    scale = [max(abs(row[at]) for row in rows) or 1.0 for at in range(size)]
    rows = [[value / by for value, by in zip(row, scale, strict=True)] for row in rows]
    matrix = [[sum(row[a] * row[b] for row in rows) for b in range(size)] + [sum(row[a] for row in rows)]
              for a in range(size)]  # fmt: skip
    for at in range(size):
        pivot = max(range(at, size), key=lambda row: abs(matrix[row][at]))
        matrix[at], matrix[pivot] = matrix[pivot], matrix[at]
        if abs(matrix[at][at]) < 1e-12:
            return at
        for row in range(size):
            if row != at:
                factor = matrix[row][at] / matrix[at][at]
                matrix[row] = [a - factor * b for a, b in zip(matrix[row], matrix[at], strict=True)]
    return [matrix[at][size] / matrix[at][at] / scale[at] for at in range(size)]


def fit_prefill(seconds: Mapping[int, float]) -> Prefill:
    """From the time to the first token of an idle engine, by prompt tokens."""
    values = list(seconds.values())
    fixed, token, square = least_squares([(1.0, float(n), float(n * n)) for n in seconds], values)
    if not token:
        # Noise: a prompt token costs something without context too.
        (fixed, token), square = least_squares([(1.0, float(n)) for n in seconds], values), 0.0
    return Prefill(fixed, token, token / (2 * square) if square and token else 0.0)


def fit_decode(seconds: Mapping[tuple[int, int], float]) -> Decode:
    """From the time of a step, by running sequences and tokens of context of each."""
    rows = [(1.0, float(count), float(count * context)) for count, context in seconds]
    return Decode(*least_squares(rows, list(seconds.values())))


def fit_hand_over(direct: Mapping[int, float], through: Mapping[int, float]) -> HandOver:
    """From the time to the first token of one engine, and of a pair behind a proxy, by prompt tokens."""
    more = {n: max(1e-6, through[n] - direct[n]) for n in through if n in direct}
    fixed, per_token = least_squares([(1.0, float(n)) for n in more], list(more.values()))
    return HandOver(fixed, 1 / per_token if per_token else NO_SPEED_LIMIT)
