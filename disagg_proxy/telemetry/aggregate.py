"""The numbers of the whole proxy, put together from those of its processes.

A process publishes its own as one text; whoever is asked for /stats or /metrics adds them up. Counters of workers that
have died are kept by the supervisor, so that no counter goes back.
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
    "requests_total", "failures_total", "freezes", "replays", "drains", "drains_failed", "kv_missing",
    "prefills_refused",
)  # fmt: skip
"""Of each instance: what each process counts for itself."""

SEEN = ("times_lost", "restarts")
"""Of each instance: what every process sees by itself."""


@dataclass(slots=True)
class Overview:
    """What /stats and /metrics are made from.

    Attributes:
        instances: by HTTP endpoint, the values of :data:`COUNTED`.
        seen: the values of :data:`SEEN`, of the process that has seen most; gauges: sums of what there is now. Both by
            :func:`about`.
        workers: what /stats says of each worker; empty when the proxy is one process.
        restarts: workers that were replaced.
    """

    stats: Stats
    traffic: RegistrationCounts
    refused: Counter[str]
    in_background: int
    queued: int
    instances: Mapping[str, Mapping[str, int]]
    seen: Mapping[str, int] = field(default_factory=dict)
    gauges: Mapping[str, int] = field(default_factory=dict)
    workers: list[dict[str, Any]] = field(default_factory=list)
    restarts: int = 0

    def counted(self, instance: Instance) -> Mapping[str, int]:
        """The values of :data:`COUNTED` of one instance, which may have come after the numbers were put together."""
        return self.instances.get(instance.key) or _counts(instance)

    def tokens_in_flight(self, instance: Instance) -> int:
        """Estimated tokens of the requests on it."""
        return self.gauges.get(about(instance, "tokens"), 0)

    def breakers(self, instance: Instance, state: BreakerState) -> int:
        """In how many processes its breaker is in that state."""
        return self.gauges.get(about(instance, state.value), 0)

    def has_seen(self, instance: Instance, name: str) -> int:
        """One of :data:`SEEN`."""
        return self.seen.get(about(instance, name), 0)


def about(instance: Instance, name: str) -> str:
    """The name of one number of one instance."""
    return f"{name} {instance.key}"


def seen_of(instances: Iterable[Instance]) -> dict[str, int]:
    """What one process has seen of each instance."""
    return {about(i, name): value for i in instances for name in SEEN if (value := getattr(i, name))}


def gauges_of(instances: Iterable[Instance], now: float) -> dict[str, int]:
    """What one process has on each instance now."""
    found = {about(i, "tokens"): i.tokens_in_flight for i in instances if i.tokens_in_flight}
    return {**found, **{about(i, i.breaker.state(now).value): 1 for i in instances}}


def _counts(instance: Instance) -> dict[str, int]:
    return {name: getattr(instance, name) for name in COUNTED}


def counts_of(instances: Iterable[Instance]) -> dict[str, dict[str, int]]:
    """What one process has counted of each instance."""
    return {i.key: _counts(i) for i in instances}


# -- one process


OWN_GAUGES = ("in_background", "queued")
"""Those that are of no instance."""


@dataclass(slots=True)
class Part:
    """What one process publishes.

    Attributes:
        incarnation: which worker of those that there were in its place.
        stats, instances: as in :class:`Overview`; ``gauges`` by name: what ends with the process.
    """

    incarnation: int
    stats: dict[str, Any]
    instances: dict[str, dict[str, int]]
    gauges: dict[str, int]
    refused: dict[str, int]
    seen: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, own: Overview, incarnation: int) -> Part:
        """The numbers of one process, for publication."""
        return cls(
            incarnation,
            pack_stats(own.stats),
            {key: dict(counts) for key, counts in own.instances.items()},
            {"in_background": own.in_background, "queued": own.queued, **own.gauges},
            dict(own.refused),
            dict(own.seen),
        )

    def pack(self, most: int) -> bytes:
        """As at most ``most`` bytes of msgpack: the numbers of single instances and the recent latencies are dropped
        where they do not fit."""
        text = bytes(
            msgpack.packb([self.incarnation, self.stats, self.instances, self.gauges, self.refused, self.seen])
        )
        if len(text) > most:
            gauges = {name: self.gauges[name] for name in OWN_GAUGES if name in self.gauges}
            text = bytes(msgpack.packb([self.incarnation, without_recent(self.stats), {}, gauges, {}, {}]))
        return text


def unpack(text: bytes) -> Part | None:
    """What a process has published, None when it has not yet."""
    return Part(*msgpack.unpackb(text)) if text else None


def pack_stats(stats: Stats) -> dict[str, Any]:
    """All that is counted; fields of new kinds come along by themselves."""
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
    """The counts without the recent latencies."""
    return {name: [*value[:3], b""] if _is_latency(value) else value for name, value in stats.items()}


def _is_latency(packed: Any) -> bool:
    return isinstance(packed, list) and isinstance(packed[-1], bytes)


def without_gauges(stats: Mapping[str, Any]) -> dict[str, Any]:
    """What stays counted when the process is gone."""
    kept = {**without_recent(stats), "in_flight": 0}
    return {**kept, "drains": {**kept["drains"], "waiting": 0}} if "drains" in kept else kept


# -- all of them


def add(one: Any, other: Any) -> Any:
    """Two packed values together."""
    if isinstance(one, dict):
        return {key: add(one[key], other[key]) if key in one and key in other else one.get(key, other.get(key))
                for key in {**one, **other}}  # fmt: skip
    if isinstance(one, list):
        return [add(mine, others) for mine, others in zip(one, other, strict=True)]
    return one + other


def unpack_stats(packed: Mapping[str, Any], clock: Callable[[], float], started_at: float) -> Stats:
    """The sum as what one process would have counted by itself."""
    stats = Stats(clock)
    stats.started_at = started_at
    for one in fields(Stats):
        if one.name not in packed:
            continue
        value, now = packed[one.name], getattr(stats, one.name)
        if isinstance(now, Histogram):
            now.load(value)
            continue
        if isinstance(now, KvReleases):
            value = KvReleases(**value)
        elif isinstance(now, Counter):
            value = Counter(value)
        setattr(stats, one.name, value)
    return stats


def highest(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """What several processes have seen alike, of which a new one has seen less."""
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in {**one, **other}}


@dataclass(slots=True)
class RetiredTotals:
    """What the supervisor publishes: its own numbers, and those of workers that have died.

    Attributes:
        started_at: monotonic seconds.
        merged: of each worker, the last incarnation whose numbers are in ``dead``.
        workers: of each, its process id, when it was started (Unix time), and how often it was replaced.
    """

    started_at: float
    messages: int
    dropped: dict[str, int]
    dead: list[Any]
    merged: list[int]
    workers: list[dict[str, Any]]

    def pack(self) -> bytes:
        """The text."""
        return bytes(
            msgpack.packb([self.started_at, self.messages, self.dropped, self.dead, self.merged, self.workers])
        )


def unpack_ground(text: bytes) -> RetiredTotals | None:
    """What the supervisor has published, None when it has not yet."""
    return RetiredTotals(*msgpack.unpackb(text)) if text else None


def merge(parts: Iterable[Part | None], ground: RetiredTotals) -> Overview:
    """The whole. ``parts`` must have been read before ``ground``, or a worker that dies meanwhile is missing."""
    stats, instances, refused, seen = ground.dead if ground.dead else ({}, {}, {}, {})
    gauges: Counter[str] = Counter()
    for number, part in enumerate(parts):
        if part is None or part.incarnation <= ground.merged[number]:
            continue
        stats = add(stats, part.stats)
        instances = add(instances, part.instances)
        refused = highest(refused, part.refused)
        seen = highest(seen, part.seen)
        gauges.update(part.gauges)
    return Overview(
        stats=unpack_stats(stats, time.monotonic, ground.started_at),
        traffic=RegistrationCounts(ground.messages, Counter(ground.dropped)),
        refused=Counter(refused),
        in_background=gauges["in_background"],
        queued=gauges["queued"],
        instances=instances,
        seen=seen,
        gauges=gauges,
        workers=[dict(worker) for worker in ground.workers],
        restarts=sum(worker["restarts"] for worker in ground.workers),
    )


def bury(part: Part | None, ground: RetiredTotals, worker: int, incarnation: int) -> None:
    """Take a dead worker's numbers over."""
    ground.merged[worker] = incarnation
    if part is None or part.incarnation != incarnation:
        return
    stats, instances, refused, seen = ground.dead if ground.dead else ({}, {}, {}, {})
    ground.dead = [
        add(stats, without_gauges(part.stats)),
        add(instances, part.instances),
        highest(refused, part.refused),
        highest(seen, part.seen),
    ]
