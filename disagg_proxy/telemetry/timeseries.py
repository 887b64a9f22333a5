"""The last ten minutes in steps of 5 s: what came in each of them, and the highest of what is looked at once a second.

Steps begin at multiples of 5 s of Unix time, so that those of several workers can be added. Latencies are kept as
counts in bins that grow by 2^(1/8), so that a percentile over any steps and workers is right to within 5 %.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

SECONDS = 5
"""Of one step."""

STEPS = 120

_BINS = 8.0
_SHORTEST = 1e-6


class LatencyHistogram:
    """Counts of durations."""

    __slots__ = ("counts",)

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: dict[int, int] = dict(counts or {})

    def add(self, seconds: float) -> None:
        """Take in one."""
        at = math.floor(math.log2(seconds if seconds > _SHORTEST else _SHORTEST) * _BINS)
        self.counts[at] = self.counts.get(at, 0) + 1

    def take(self, other: Mapping[int, int]) -> None:
        """Take in the counts of another."""
        for at, count in other.items():
            self.counts[at] = self.counts.get(at, 0) + count

    def quantile(self, share: float) -> float | None:
        """Seconds that so large a share is below; None without any."""
        whole = sum(self.counts.values())
        wanted, seen = share * whole, 0
        for at in sorted(self.counts):
            seen += self.counts[at]
            if seen >= wanted:
                return float(2 ** ((at + 0.5) / _BINS))
        return None


class Step:
    """5 s of one process, or of all.

    Attributes:
        start: Unix time.
        outcomes: requests that ended, by outcome.
        pieces: of streamed bodies. prompt_tokens, output_tokens: of requests that ended, where they are known.
        ttft, gap: durations; gap: between two pieces, sampled.
        in_flight, queued, kv_waiting_bytes: the highest that was seen.
        packed: as it is published (news.py), once it is over.
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
        """As plain values."""
        return [
            self.start, dict(self.outcomes), self.pieces, self.prompt_tokens, self.output_tokens, self.ttft.counts,
            self.gap.counts, self.in_flight, self.queued, self.kv_waiting_bytes,
        ]  # fmt: skip

    @classmethod
    def of(cls, row: list[Any]) -> Step:
        """From :meth:`row`."""
        step = cls(row[0])
        step.outcomes.update(row[1])
        step.pieces, step.prompt_tokens, step.output_tokens = row[2:5]
        step.ttft, step.gap = LatencyHistogram(row[5]), LatencyHistogram(row[6])
        step.in_flight, step.queued, step.kv_waiting_bytes = row[7:10]
        return step

    def take(self, other: Step) -> None:
        """What another process saw in the same time. All see the same KV."""
        self.outcomes.update(other.outcomes)
        self.pieces += other.pieces
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens
        self.ttft.take(other.ttft.counts)
        self.gap.take(other.gap.counts)
        self.in_flight += other.in_flight
        self.queued += other.queued
        self.kv_waiting_bytes = max(self.kv_waiting_bytes, other.kv_waiting_bytes)


class TimeSeries:
    """The steps of one process. Without :meth:`look` everything goes into one step.

    Attributes:
        now: the step that is running. before: those that are over, oldest first.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self.now = Step(self._start())
        self.before: deque[Step] = deque(maxlen=STEPS - 1)

    def _start(self) -> int:
        return int(self._wall() // SECONDS) * SECONDS

    def look(self, in_flight: int, queued: int, kv_waiting_bytes: int) -> None:
        """To be called once a second with what is there now."""
        start = self._start()
        if start != self.now.start:
            self.before.append(self.now)
            self.now = Step(start)
        step = self.now
        step.in_flight = max(step.in_flight, in_flight)
        step.queued = max(step.queued, queued)
        step.kv_waiting_bytes = max(step.kv_waiting_bytes, kv_waiting_bytes)

    def inherit(self, steps: Iterable[Step]) -> None:
        """Those of a process whose place this one has taken, oldest first."""
        self.before.extendleft(step for step in reversed([*steps]) if step.start < self.now.start)
