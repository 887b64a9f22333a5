"""The last ten minutes in steps of 5 s: counts and latencies of each step, and maxima of gauges sampled once a second.

Steps start at multiples of 5 s of Unix time, so that those of several workers can be added. Latencies are counted in
bins that grow by 2^(1/8), so that a quantile over any steps and workers is accurate to 5 %.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from disagg_proxy.telemetry.stats import nearest_rank

SECONDS = 5
"""Length of a step."""

STEPS = 120
"""Steps kept, the current one included."""

_BINS_PER_OCTAVE = 8.0
_MIN_SECONDS = 1e-6


class LatencyHistogram:
    """Counts of durations by logarithmic bin, for quantiles over merged steps."""

    __slots__ = ("counts",)

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: dict[int, int] = dict(counts or {})

    def add(self, seconds: float) -> None:
        """Count one duration."""
        at = math.floor(math.log2(seconds if seconds > _MIN_SECONDS else _MIN_SECONDS) * _BINS_PER_OCTAVE)
        self.counts[at] = self.counts.get(at, 0) + 1

    def merge(self, other: Mapping[int, int]) -> None:
        """Add the counts of another histogram."""
        for at, count in other.items():
            self.counts[at] = self.counts.get(at, 0) + count

    def quantile(self, quantile: float) -> float | None:
        """The quantile (0 to 1) in seconds, accurate to 5 %; None without a value."""
        rank, seen = nearest_rank(sum(self.counts.values()), quantile), 0
        for at in sorted(self.counts):
            seen += self.counts[at]
            if seen >= rank:
                return float(2 ** ((at + 0.5) / _BINS_PER_OCTAVE))
        return None


class Step:
    """5 s of one process, or of all.

    Attributes:
        start: Unix time.
        outcomes: requests that ended, by outcome.
        pieces: chunks of streamed bodies.
        prompt_tokens, output_tokens: of requests that ended, where engines reported them.
        ttft: time to first token.
        gap: time between two chunks, sampled.
        in_flight, queued, kv_waiting_bytes: maxima of the samples.
        packed: msgpack of :meth:`row`, cached by page_state.py once the step has ended.
    """

    __slots__ = (
        "gap", "in_flight", "kv_waiting_bytes", "outcomes", "output_tokens", "packed", "pieces", "prompt_tokens",
        "queued", "start", "ttft",
    )  # fmt: skip

    def __init__(self, start: int) -> None:
        self.start = start
        self.outcomes: Counter[str] = Counter()
        self.pieces = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.ttft = LatencyHistogram()
        self.gap = LatencyHistogram()
        self.in_flight = 0
        self.queued = 0
        self.kv_waiting_bytes = 0
        self.packed: bytes | None = None

    def row(self) -> list[Any]:
        """The values to be packed, for :meth:`from_row`."""
        return [
            self.start, dict(self.outcomes), self.pieces, self.prompt_tokens, self.output_tokens, self.ttft.counts,
            self.gap.counts, self.in_flight, self.queued, self.kv_waiting_bytes,
        ]  # fmt: skip

    @classmethod
    def from_row(cls, row: list[Any]) -> Step:
        """The step with the values of :meth:`row`."""
        step = cls(row[0])
        step.outcomes.update(row[1])
        step.pieces, step.prompt_tokens, step.output_tokens = row[2:5]
        step.ttft, step.gap = LatencyHistogram(row[5]), LatencyHistogram(row[6])
        step.in_flight, step.queued, step.kv_waiting_bytes = row[7:10]
        return step

    def merge(self, other: Step) -> None:
        """Add the same step of another process. ``kv_waiting_bytes`` is already a total in each: the maximum counts."""
        self.outcomes.update(other.outcomes)
        self.pieces += other.pieces
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens
        self.ttft.merge(other.ttft.counts)
        self.gap.merge(other.gap.counts)
        self.in_flight += other.in_flight
        self.queued += other.queued
        self.kv_waiting_bytes = max(self.kv_waiting_bytes, other.kv_waiting_bytes)


class TimeSeries:
    """The steps of one process. :meth:`sample` starts new ones.

    Attributes:
        now: the current step.
        past: steps that have ended, oldest first.

    Args:
        wall: Unix time in seconds.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self.now = Step(self._start())
        self.past: deque[Step] = deque(maxlen=STEPS - 1)

    def _start(self) -> int:
        return int(self._wall() // SECONDS) * SECONDS

    def sample(self, in_flight: int, queued: int, kv_waiting_bytes: int) -> None:
        """Record the current gauges, and start the next step when it is time. To be called once a second."""
        start = self._start()
        if start != self.now.start:
            self.past.append(self.now)
            self.now = Step(start)
        step = self.now
        step.in_flight = max(step.in_flight, in_flight)
        step.queued = max(step.queued, queued)
        step.kv_waiting_bytes = max(step.kv_waiting_bytes, kv_waiting_bytes)

    def inherit(self, steps: Iterable[Step]) -> None:
        """Prepend the steps of the worker that this one replaces, oldest first."""
        self.past.extendleft(step for step in reversed([*steps]) if step.start < self.now.start)
