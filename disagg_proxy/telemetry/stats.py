"""Counts and recent latencies of the proxy itself: plain numbers that only the event loop changes.

:class:`RegistrationCounts` is the exception: the listener's thread changes it.
"""

from __future__ import annotations

import array
import statistics
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

_RECENT = 2048
"""Latencies that the percentiles look back on."""


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
"""Upper bounds of buckets, after those of vLLM's own histograms of the same quantities (``v1/metrics/loggers.py``), so
that both fit on one chart; for gaps and totals some more at the lower end."""


class Histogram:
    """Counts of values by bucket, and their sum.

    Args:
        bounds: rising upper bounds, each itself inside; what is above the last one counts too.
    """

    def __init__(self, bounds: Sequence[float] = TTFT) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Take in one value."""
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def pack(self) -> list[Any]:
        """As plain values that can be added, element by element, to those of another process."""
        return [self.sum, list(self.buckets)]

    def load(self, packed: list[Any]) -> None:
        """Take over what :meth:`pack` gave."""
        self.sum, self.buckets = packed[:2]


class Latency(Histogram):
    """Also percentiles over the last few thousand values, in seconds."""

    def __init__(self, bounds: Sequence[float] = TTFT) -> None:
        super().__init__(bounds)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.count = 0

    def pack(self) -> list[Any]:
        """The same with the recent values, as bytes."""
        return [*super().pack(), self.count, array.array("d", self._recent).tobytes()]

    def load(self, packed: list[Any]) -> None:
        """Take over what :meth:`pack` gave, or a sum of such."""
        super().load(packed)
        self.count = packed[2]
        recent = array.array("d")
        recent.frombytes(packed[3])
        self._recent = deque(recent)

    @property
    def recent(self) -> Iterable[float]:
        """The last few thousand values."""
        return self._recent

    def add(self, value: float) -> None:
        """Take in one value."""
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.sum += value
        self._recent.append(value)
        self.count += 1

    def summary(self) -> dict[str, float | int | None]:
        """count, and p50, p90, p99 and max of the recent values in seconds (None before the first)."""
        values = sorted(self._recent)
        if not values:
            return {"count": 0, "p50_s": None, "p90_s": None, "p99_s": None, "max_s": None}
        cuts = values * 99 if len(values) == 1 else statistics.quantiles(values, n=100, method="inclusive")
        p50, p90, p99, top = (round(v, 6) for v in (cuts[49], cuts[89], cuts[98], values[-1]))
        return {"count": self.count, "p50_s": p50, "p90_s": p90, "p99_s": p99, "max_s": top}


@dataclass(slots=True)
class KvReleases:
    """Prefilled KV whose decode will not come, freed on its decode instance.

    Attributes:
        tokens: prompt tokens whose KV was freed.
        waiting: drains that have begun and not ended.
    """

    started: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0
    waiting: int = 0


@dataclass(slots=True)
class RegistrationCounts:
    """Registration messages that the listener has received: how many in all, and those dropped by kind."""

    messages: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Stats:
    """Totals since the start.

    Attributes:
        clock: monotonic seconds.
        in_flight: generation requests that have places on instances.
        outcomes: finished generation requests by how they ended (telemetry/request_record.py).
        prefill: from sending the prefill to its answer.
        ttft: from the complete request to the first byte of a streamed answer's body, the queue included.
        gap: between two pieces of a streamed answer, sampled (telemetry/request_record.py).
        total: from the complete request to the last byte.
        failovers: tries on another pair after an instance failed.
        pieces: of streamed answers.
        prompts, outputs: lengths in tokens of finished requests, as far as the engines' answers told.
        labelled: finished requests by route, outcome, cause and model, joined by tabs.
        prompt_tokens, cached_tokens, output_tokens: of finished requests, as far as the engines' answers told.
        queued: time in the admission queue, of those that had to wait.
        turned_away: requests that got 429 from the proxy itself.
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
    labelled: Counter[str] = field(default_factory=Counter)
    drains: KvReleases = field(default_factory=KvReleases)
    failovers: int = 0
    queued: Latency = field(default_factory=Latency)
    turned_away: int = 0

    def __post_init__(self) -> None:
        self.started_at = self.clock()
