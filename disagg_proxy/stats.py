"""Counts and recent latencies of the proxy itself. Plain numbers, changed on the event loop only."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

_RECENT = 2048
"""Latencies that the percentiles look back on."""


class Latency:
    """Percentiles over the last few thousand values, in seconds."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.count = 0

    @classmethod
    def of_all(cls, parts: Iterable[tuple[int, Iterable[float]]]) -> Latency:
        """Those of several processes together, each with its count and its recent values."""
        whole = cls()
        whole._recent = deque()
        for count, recent in parts:
            whole.count += count
            whole._recent.extend(recent)
        return whole

    @property
    def recent(self) -> Iterable[float]:
        """The last few thousand values."""
        return self._recent

    def add(self, seconds: float) -> None:
        """Take in one value."""
        self._recent.append(seconds)
        self.count += 1

    def summary(self) -> dict[str, float | int | None]:
        """count, and p50, p90, p99 and max of the recent values in seconds (None before the first)."""
        values = sorted(self._recent)
        if not values:
            return {"count": 0, "p50_s": None, "p90_s": None, "p99_s": None, "max_s": None}
        if len(values) == 1:
            cuts = values * 99
        else:
            cuts = statistics.quantiles(values, n=100, method="inclusive")
        p50, p90, p99, top = (round(v, 6) for v in (cuts[49], cuts[89], cuts[98], values[-1]))
        return {"count": self.count, "p50_s": p50, "p90_s": p90, "p99_s": p99, "max_s": top}


@dataclass(slots=True)
class Drains:
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
class Stats:
    """Totals since the start.

    Attributes:
        clock: monotonic seconds.
        in_flight: generation requests that have places on instances.
        outcomes: finished generation requests by how they ended (observe/record.py).
        prefill: from sending the prefill to its answer.
        ttft: from the complete request to the first byte of a streamed answer's body, the queue included.
        gap: between two pieces of a streamed answer, sampled (observe/record.py).
        total: from the complete request to the last byte.
        failovers: tries on another pair after an instance failed.
        prompt_tokens, output_tokens: of finished requests, as far as the engines' answers told.
        queued: time in the admission queue, of those that had to wait.
        turned_away: requests that got 429 from the proxy itself.
    """

    clock: Callable[[], float]
    started_at: float = field(init=False)
    in_flight: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    prefill: Latency = field(default_factory=Latency)
    ttft: Latency = field(default_factory=Latency)
    total: Latency = field(default_factory=Latency)
    gap: Latency = field(default_factory=Latency)
    prompt_tokens: int = 0
    output_tokens: int = 0
    drains: Drains = field(default_factory=Drains)
    failovers: int = 0
    queued: Latency = field(default_factory=Latency)
    turned_away: int = 0

    def __post_init__(self) -> None:
        self.started_at = self.clock()
