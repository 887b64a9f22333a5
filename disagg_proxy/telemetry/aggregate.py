"""The totals of the whole proxy, merged from those of its processes.

A process publishes its totals as one msgpack text; the process that serves /stats or /metrics adds them up. The
supervisor keeps the counters of workers that have died, so that no counter decreases.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import msgpack

from disagg_proxy.cluster.circuit_breaker import BreakerState
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.telemetry.stats import Histogram, KvReleases, RegistrationCounts, Stats

COUNTED = (
    "requests_total", "failures_total", "freezes", "replays", "kv_releases", "kv_releases_failed", "kv_missing",
    "prefills_refused", "rejections_total",
)  # fmt: skip
"""Attributes of an instance that each process counts for its own requests: summed over all processes."""

SEEN = ("times_lost", "restarts", "role_moves")
"""Attributes of an instance that every process observes alike: the highest of all processes."""


@dataclass(slots=True)
class Overview:
    """What /stats and /metrics report.

    Attributes:
        stats: totals and latencies.
        registrations: messages at the registration port.
        refused: refused registrations by reason.
        in_background: prefills and KV releases running without a client.
        queued: requests in the admission queue.
        instances: values of :data:`COUNTED` by the key of the instance.
        seen: values of :data:`SEEN` by :func:`instance_value`.
        gauges: current values, summed, by :func:`instance_value`.
        workers: the entries of ``workers`` in /stats; empty for a single process.
        restarts: workers that were replaced.
    """

    stats: Stats
    registrations: RegistrationCounts
    refused: Counter[str]
    in_background: int
    queued: int
    instances: Mapping[str, Mapping[str, int]]
    seen: Mapping[str, int] = field(default_factory=dict)
    gauges: Mapping[str, int] = field(default_factory=dict)
    workers: list[dict[str, Any]] = field(default_factory=list)
    restarts: int = 0

    def counted(self, instance: Instance) -> Mapping[str, int]:
        """The values of :data:`COUNTED`; those of this process if ``instance`` registered after the merge."""
        return self.instances.get(instance.key) or _counts(instance)

    def tokens_in_flight(self, instance: Instance) -> int:
        """Prompt tokens of the legs in flight on ``instance``, estimated."""
        return self.gauges.get(instance_value(instance, "tokens"), 0)

    def breakers(self, instance: Instance, state: BreakerState) -> int:
        """Number of processes whose circuit breaker for ``instance`` is in ``state``."""
        return self.gauges.get(instance_value(instance, state.value), 0)

    def suspect(self, instance: Instance) -> bool:
        """Whether any process suspects ``instance`` to be stalled."""
        return self.gauges.get(instance_value(instance, "suspect"), 0) > 0

    def busy(self, instance: Instance) -> bool:
        """Whether ``instance`` has just rejected a request of any process because it is busy."""
        return self.gauges.get(instance_value(instance, "busy"), 0) > 0

    def seen_count(self, instance: Instance, name: str) -> int:
        """The value of one of :data:`SEEN`."""
        return self.seen.get(instance_value(instance, name), 0)


def instance_value(instance: Instance, name: str) -> str:
    """The key under which a value of one instance is published."""
    return f"{name} {instance.key}"


def seen_of(instances: Iterable[Instance]) -> dict[str, int]:
    """The non-zero values of :data:`SEEN` of this process."""
    return {instance_value(i, name): value for i in instances for name in SEEN if (value := getattr(i, name))}


def gauges_of(instances: Iterable[Instance], now: float) -> dict[str, int]:
    """Tokens in flight of each instance in this process, and what the process thinks of it: the state of its circuit
    breaker, whether it is suspect or busy.

    Args:
        now: reading of the registry's clock in seconds.
    """
    tokens = {instance_value(i, "tokens"): i.tokens_in_flight for i in instances if i.tokens_in_flight}
    suspects = {instance_value(i, "suspect"): 1 for i in instances if i.suspect}
    busy = {instance_value(i, "busy"): 1 for i in instances if i.breaker.busy(now)}
    return {**tokens, **suspects, **busy, **{instance_value(i, i.breaker.state(now).value): 1 for i in instances}}


def _counts(instance: Instance) -> dict[str, int]:
    return {name: getattr(instance, name) for name in COUNTED}


def counts_of(instances: Iterable[Instance]) -> dict[str, dict[str, int]]:
    """The values of :data:`COUNTED` of this process, by the key of the instance."""
    return {i.key: _counts(i) for i in instances}


# -- one process


PROCESS_GAUGES = ("in_background", "queued")
"""Gauges of a process, as opposed to those of instances."""


@dataclass(slots=True)
class ProcessTotals:
    """What one process publishes.

    Attributes:
        incarnation: from 1, one more for each replacement of this worker.
        stats: from :func:`pack_stats`.
        gauges: current values, which disappear with the process.
        instances, refused, seen: as in :class:`Overview`.
    """

    incarnation: int
    stats: dict[str, Any]
    instances: dict[str, dict[str, int]]
    gauges: dict[str, int]
    refused: dict[str, int]
    seen: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_overview(cls, own: Overview, incarnation: int) -> ProcessTotals:
        """The totals of this process, ready for :meth:`pack`."""
        return cls(
            incarnation,
            pack_stats(own.stats),
            {key: dict(counts) for key, counts in own.instances.items()},
            {"in_background": own.in_background, "queued": own.queued, **own.gauges},
            dict(own.refused),
            dict(own.seen),
        )

    def pack(self, max_bytes: int) -> bytes:
        """As msgpack. Beyond ``max_bytes`` the values of instances and the recent latencies are omitted."""
        text = bytes(
            msgpack.packb([self.incarnation, self.stats, self.instances, self.gauges, self.refused, self.seen])
        )
        if len(text) > max_bytes:
            gauges = {name: self.gauges[name] for name in PROCESS_GAUGES if name in self.gauges}
            text = bytes(msgpack.packb([self.incarnation, without_recent(self.stats), {}, gauges, {}, {}]))
        return text


def unpack(text: bytes) -> ProcessTotals | None:
    """Reverse :meth:`ProcessTotals.pack`; None for an empty text, before the first publication."""
    return ProcessTotals(*msgpack.unpackb(text)) if text else None


def pack_stats(stats: Stats) -> dict[str, Any]:
    """All fields of ``stats`` but its clock, as plain values that :func:`add` can sum."""
    packed: dict[str, Any] = {}
    for one in fields(Stats):
        value = getattr(stats, one.name)
        if isinstance(value, Histogram):
            packed[one.name] = value.pack()
        elif isinstance(value, KvReleases):
            packed[one.name] = {part.name: getattr(value, part.name) for part in fields(KvReleases)}
        elif isinstance(value, (int, Counter)):
            packed[one.name] = value if isinstance(value, int) else dict(value)
    return packed


def without_recent(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Packed stats with the histograms but without the recent latencies."""
    return {name: [*value[:3], b""] if _is_latency(value) else value for name, value in stats.items()}


def _is_latency(packed: Any) -> bool:
    return isinstance(packed, list) and isinstance(packed[-1], bytes)


def without_gauges(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Packed stats reduced to the counters, which stay valid when the process has ended."""
    kept = {**without_recent(stats), "in_flight": 0}
    return {**kept, "kv_releases": {**kept["kv_releases"], "waiting": 0}} if "kv_releases" in kept else kept


# -- all processes


def add(one: Any, other: Any) -> Any:
    """The sum of two packed values: numbers and bytes by ``+``, lists by element, dicts by key."""
    if isinstance(one, dict):
        return {key: add(one[key], other[key]) if key in one and key in other else one.get(key, other.get(key))
                for key in {**one, **other}}  # fmt: skip
    if isinstance(one, list):
        return [add(mine, others) for mine, others in zip(one, other, strict=True)]
    return one + other


def unpack_stats(packed: Mapping[str, Any], clock: Callable[[], float], started_at: float) -> Stats:
    """Stats with the values of ``packed``.

    Args:
        clock: monotonic seconds.
        started_at: a reading of ``clock``.
    """
    stats = Stats(clock)
    stats.started_at = started_at
    for one in fields(Stats):
        if one.name not in packed:
            continue
        value, default = packed[one.name], getattr(stats, one.name)
        if isinstance(default, Histogram):
            default.load(value)
            continue
        if isinstance(default, KvReleases):
            value = KvReleases(**value)
        elif isinstance(default, Counter):
            value = Counter(value)
        setattr(stats, one.name, value)
    return stats


def highest(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """The maximum of each value: for what all processes observe alike, of which a new one has observed less."""
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in {**one, **other}}


@dataclass(slots=True)
class RetiredTotals:
    """What the supervisor publishes: its own numbers, and the counters of workers that have died.

    Attributes:
        started_at: monotonic seconds.
        messages, dropped: registration messages, as in :class:`~disagg_proxy.telemetry.stats.RegistrationCounts`.
        dead: packed stats, instances, refused and seen of all dead workers; empty before the first death.
        merged: for each worker the last incarnation that ``dead`` includes.
        workers: for each worker its number, process id, start (Unix time) and number of restarts.
    """

    started_at: float
    messages: int
    dropped: dict[str, int]
    dead: list[Any]
    merged: list[int]
    workers: list[dict[str, Any]]

    def pack(self) -> bytes:
        """As msgpack."""
        return bytes(
            msgpack.packb([self.started_at, self.messages, self.dropped, self.dead, self.merged, self.workers])
        )


def unpack_retired(text: bytes) -> RetiredTotals | None:
    """Reverse :meth:`RetiredTotals.pack`; None for an empty text, before the first publication."""
    return RetiredTotals(*msgpack.unpackb(text)) if text else None


def merge(parts: Iterable[ProcessTotals | None], retired: RetiredTotals) -> Overview:
    """The totals of the whole proxy.

    Args:
        parts: by worker number. Must have been read before ``retired``, else a worker that dies in between is missing.
    """
    stats, instances, refused, seen = retired.dead if retired.dead else ({}, {}, {}, {})
    gauges: Counter[str] = Counter()
    for number, part in enumerate(parts):
        if part is None or part.incarnation <= retired.merged[number]:
            continue
        stats = add(stats, part.stats)
        instances = add(instances, part.instances)
        refused = highest(refused, part.refused)
        seen = highest(seen, part.seen)
        gauges.update(part.gauges)
    return Overview(
        stats=unpack_stats(stats, time.monotonic, retired.started_at),
        registrations=RegistrationCounts(retired.messages, Counter(retired.dropped)),
        refused=Counter(refused),
        in_background=gauges["in_background"],
        queued=gauges["queued"],
        instances=instances,
        seen=seen,
        gauges=gauges,
        workers=[dict(worker) for worker in retired.workers],
        restarts=sum(worker["restarts"] for worker in retired.workers),
    )


def retire(part: ProcessTotals | None, retired: RetiredTotals, worker: int, incarnation: int) -> None:
    """Add the counters of a dead worker to ``retired``.

    Args:
        part: what it had published last; ignored if an earlier incarnation published it.
    """
    retired.merged[worker] = incarnation
    if part is None or part.incarnation != incarnation:
        return
    stats, instances, refused, seen = retired.dead if retired.dead else ({}, {}, {}, {})
    retired.dead = [
        add(stats, without_gauges(part.stats)),
        add(instances, part.instances),
        highest(refused, part.refused),
        highest(seen, part.seen),
    ]
