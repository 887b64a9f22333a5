"""Counters, histograms and recent latencies of one process.

Not thread-safe: only the event loop updates them, but for :class:`RegistrationCounts`, which the listener's thread
updates, and ``access_log_write_errors``, which the writer thread of the access log updates.
"""

from __future__ import annotations

import array
import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

_RECENT = 2048
"""Values that percentiles are computed from."""


TTFT: Sequence[float] = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
GAP: Sequence[float] = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5,
    10, 20, 40, 80,
)  # fmt: skip
TOTAL: Sequence[float] = (
    0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
TOKENS: Sequence[float] = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
"""Bucket bounds in seconds and tokens. They follow vLLM's own histograms (``v1/metrics/loggers.py``), so that both fit
on one chart; gaps and totals have a few more at the lower end."""


def nearest_rank(count: int, quantile: float) -> int:
    """The 1-based position of a quantile among ``count`` sorted values (nearest-rank method).

    Args:
        quantile: from 0 to 1.
    """
    return max(1, math.ceil(quantile * count))


class Histogram:
    """Counts of values by bucket, and their sum.

    Args:
        bounds: ascending upper bounds, inclusive; one more bucket holds the values above the last bound.
    """

    def __init__(self, bounds: Sequence[float] = TTFT) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def pack(self) -> list[Any]:
        """As plain values, which aggregate.py adds to those of other processes element by element."""
        return [self.sum, list(self.buckets)]

    def load(self, packed: list[Any]) -> None:
        """Replace the values by those from :meth:`pack`."""
        self.sum, self.buckets = packed[:2]


class Latency(Histogram):
    """A histogram of seconds that also keeps the last 2048 values for percentiles.

    Attributes:
        count: values since the start.
    """

    def __init__(self, bounds: Sequence[float] = TTFT) -> None:
        super().__init__(bounds)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.count = 0

    def pack(self) -> list[Any]:
        """As in :class:`Histogram`, with the count and the recent values as bytes."""
        return [*super().pack(), self.count, array.array("d", self._recent).tobytes()]

    def load(self, packed: list[Any]) -> None:
        """Replace the values by those from :meth:`pack`, or by a sum of several."""
        super().load(packed)
        self.count = packed[2]
        recent = array.array("d")
        recent.frombytes(packed[3])
        self._recent = deque(recent)

    @property
    def recent(self) -> Iterable[float]:
        """The last 2048 values, of each process after a merge."""
        return self._recent

    def add(self, value: float) -> None:
        """Count one value, in seconds."""
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.sum += value
        self._recent.append(value)
        self.count += 1

    def summary(self) -> dict[str, float | int | None]:
        """``count``, and p50, p90, p99 and max of the recent values in seconds (None without a value)."""
        values = sorted(self._recent)
        if not values:
            return {"count": 0, "p50_s": None, "p90_s": None, "p99_s": None, "max_s": None}
        p50, p90, p99, top = (round(values[nearest_rank(len(values), q) - 1], 6) for q in (0.5, 0.9, 0.99, 1.0))
        return {"count": self.count, "p50_s": p50, "p90_s": p90, "p99_s": p99, "max_s": top}


@dataclass(slots=True)
class KvReleases:
    """Releases of abandoned KV: KV of requests that no decode will load any more.

    Attributes:
        started, done, failed: releases by result.
        tokens: prompt tokens whose KV was released.
        waiting: releases in progress.
    """

    started: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0
    waiting: int = 0


@dataclass(slots=True)
class RegistrationCounts:
    """Registration messages received, and the number of dropped ones by kind."""

    messages: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Stats:
    """Totals since the start of the process.

    Attributes:
        clock: monotonic seconds.
        started_at: reading of ``clock`` at the start.
        in_flight: generation requests admitted and not finished.
        outcomes: finished generation requests by outcome (request_record.py).
        prefill: seconds from sending a prefill to its response.
        ttft: seconds from the complete request to the first body byte of a streamed response, queueing included.
        total: seconds from the complete request to the last byte of a complete response.
        gap: seconds between two chunks of a streamed response, sampled (request_record.py).
        pieces: chunks of streamed responses.
        prompts, outputs: lengths in tokens of finished requests whose engines reported them.
        prompt_tokens, cached_tokens, output_tokens: sums over finished requests whose engines reported them.
        alone_prompt_tokens: the part of ``prompt_tokens - cached_tokens`` that decode computed without a prefill.
        ways: attempts by where they are prefilled (:class:`disagg_proxy.cluster.choice.Way`).
        uncounted_chunks: chunks of streamed responses whose output tokens were not reported.
        labelled: finished requests by route, outcome, cause and model, joined by tabs.
        kv_releases: releases of abandoned KV.
        failovers: attempts on another pair after an instance failed.
        queued: seconds in the admission queue, of requests that had to wait.
        turned_away: requests rejected with 429 because the queue was full or the wait too long.
        key_requests: finished generation requests by key and outcome, joined by a tab; of keys of API_KEYS_FILE only.
        key_tokens: their tokens by key and kind, prompt or generation.
        key_refusals: requests refused with 429 by key and limit, requests or tokens.
        access_log_lines_dropped: lines of the access log that were dropped.
        access_log_write_errors: failed writes of the access log; their lines are kept and retried.
    """

    clock: Callable[[], float]
    started_at: float = field(init=False)
    in_flight: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    prefill: Latency = field(default_factory=Latency)
    ttft: Latency = field(default_factory=Latency)
    total: Latency = field(default_factory=lambda: Latency(TOTAL))
    gap: Latency = field(default_factory=lambda: Latency(GAP))
    pieces: int = 0
    prompts: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    outputs: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    alone_prompt_tokens: int = 0
    ways: Counter[str] = field(default_factory=Counter)
    uncounted_chunks: int = 0
    labelled: Counter[str] = field(default_factory=Counter)
    kv_releases: KvReleases = field(default_factory=KvReleases)
    failovers: int = 0
    queued: Latency = field(default_factory=Latency)
    turned_away: int = 0
    key_requests: Counter[str] = field(default_factory=Counter)
    key_tokens: Counter[str] = field(default_factory=Counter)
    key_refusals: Counter[str] = field(default_factory=Counter)
    access_log_lines_dropped: int = 0
    access_log_write_errors: int = 0

    def __post_init__(self) -> None:
        self.started_at = self.clock()
