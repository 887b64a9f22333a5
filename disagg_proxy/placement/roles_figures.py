"""The figures that the roles of engines are decided on (placement/roles.py), read from the registry without I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.cluster.progress import ProgressTracker
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.unavailable import share_a_model
from disagg_proxy.placement.roles import InstanceFigures


def prefill_wait(instance: Instance, now: float) -> float:
    """Seconds that this process's second oldest unanswered prefill on ``instance`` has waited; 0 where there is none.

    The oldest one is taken to be computed, so its time says how long its prompt is, not how long others wait.
    """
    waiting = [p.since for p in instance.progress.pending if p.prefill and not p.begun]
    return now - waiting[1] if len(waiting) > 1 else 0.0


class TokenGaps:
    """Seconds between two chunks of the streams of an instance, between one :meth:`read` of it and the next."""

    def __init__(self) -> None:
        self._before: dict[Instance, tuple[ProgressTracker, int, float]] = {}

    def read(self, instance: Instance, now: float) -> float | None:
        """The mean over this process's streams since the last call; None without streams or output."""
        progress = instance.progress
        before = self._before.get(instance)
        self._before[instance] = (progress, progress.outputs, now)
        streams = sum(p.begun and p.expects_output and not p.prefill for p in progress.pending)
        if before is None or before[0] is not progress or not streams or progress.outputs <= before[1]:
            return None
        return streams * (now - before[2]) / (progress.outputs - before[1])

    def keep(self, instances: Iterable[Instance]) -> None:
        """Forget all other instances."""
        self._before = {i: self._before[i] for i in instances if i in self._before}


class FiguresReader:
    """Reads the figures of all instances that an engine of both roles can work with.

    Args:
        wait: seconds that prompts wait for prefill on an instance.
    """

    def __init__(self, registry: Registry, wait: Callable[[Instance], float]) -> None:
        self._registry = registry
        self._wait = wait
        self._gaps = TokenGaps()
        self._versions = (-1, -1)
        self._groups: dict[Instance, str] = {}

    def read(self, now: float) -> list[InstanceFigures]:
        """The figures at present, of each group that has an instance of both roles."""
        groups = self._current_groups()
        self._gaps.keep(groups)
        return [self._figures(instance, group, now) for instance, group in groups.items()]

    def _figures(self, instance: Instance, group: str, now: float) -> InstanceFigures:
        load = instance.engine_load
        return InstanceFigures(
            key=instance.key,
            group=group,
            roles=frozenset(instance.roles),
            assignment=instance.assignment,
            usable=instance.state is State.READY
            and not instance.draining
            and not instance.suspect
            and instance.breaker.permits(now),
            read_at=load.at if load else None,
            prefill_wait=self._wait(instance),
            prefill_tokens=instance.computing_tokens,
            running=load.running if load else None,
            kv_usage=load.kv_usage if load else None,
            kv_promised=instance.kv_committed / load.kv_capacity_tokens if load and load.kv_capacity_tokens else 0.0,
            in_flight=instance.in_flight,
            token_gap=self._gaps.read(instance, now),
        )

    def _current_groups(self) -> dict[Instance, str]:
        """The group of each instance, named after the first of its members; computed again when an instance changes."""
        registry = self._registry
        versions = (registry.version, registry.kv_compatibility.version)
        if versions != self._versions:
            self._versions, self._groups = versions, _groups(registry)
        return self._groups


def _groups(registry: Registry) -> dict[Instance, str]:
    """Instances by their group: those that are joined by pairs that share a model and can exchange KV."""
    compatible = registry.kv_compatibility.compatible
    left = [i for i in registry.instances() if i.models]
    if not any(i.kind.both_roles for i in left):
        return {}

    def paired(one: Instance, other: Instance) -> bool:
        return share_a_model(one, other) and any(
            p.serves(Role.PREFILL) and d.serves(Role.DECODE) and compatible(p, d)
            for p, d in ((one, other), (other, one))
        )

    found: dict[Instance, str] = {}
    while left:
        members = [left.pop(0)]
        for member in members:
            joined = [i for i in left if paired(member, i)]
            members += joined
            left = [i for i in left if i not in joined]
        if any(i.kind.both_roles for i in members):
            found.update(dict.fromkeys(members, min(i.key for i in members)))
    return found
