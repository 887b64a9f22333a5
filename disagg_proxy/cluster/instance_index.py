"""Which instances are known, and which of them may serve: lookups by role and model, cached between changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagg_proxy.cluster.instance import Instance, Role, State


class InstanceIndex:
    """All instances by HTTP endpoint. :class:`disagg_proxy.cluster.registry.Registry` adds and changes them.

    Attributes:
        version: changes whenever the set of instances that may serve changes.
    """

    def __init__(self) -> None:
        self.version = 0
        self._instances: dict[str, Instance] = {}
        self._serving: dict[tuple[Role, str | None], tuple[Instance, ...]] = {}

    def knows(self, instance: Instance) -> bool:
        """Whether it is still the instance at its endpoint."""
        return self._instances.get(instance.key) is instance

    def find(self, key: str) -> Instance | None:
        """The instance with this key."""
        return self._instances.get(key)

    def instances(self) -> Sequence[Instance]:
        """All known instances, prefills first, in the order of registration."""
        return sorted(self._instances.values(), key=lambda i: i.role is Role.DECODE)

    def answering(self) -> int:
        """Requests on all instances, in any state, each counted where its answer is generated."""
        return sum([i.answering for i in self._instances.values()])

    def ready(self, role: Role) -> Sequence[Instance]:
        """Ready instances of one role, drained ones included."""
        return self._cached(role, None, lambda i: True)

    def serving(self, role: Role, model: str | None) -> Sequence[Instance]:
        """Ready instances of one role that serve ``model`` (None: any), drained ones included."""
        if model is None:
            return self.ready(role)
        return self._cached(role, model, lambda i: model in i.models)

    def accepting(self, role: Role, model: str | None = None) -> Sequence[Instance]:
        """As :meth:`serving`, without drained instances."""
        return [i for i in self.serving(role, model) if not i.draining]

    def _cached(self, role: Role, model: str | None, wanted: Callable[[Instance], bool]) -> Sequence[Instance]:
        found = self._serving.get((role, model))
        if found is None:
            found = tuple(
                i for i in self._instances.values() if i.serves(role) and i.state is State.READY and wanted(i)
            )
            if found:
                # Names that no instance serves are not cached: clients choose them, so their number is unbounded.
                self._serving[(role, model)] = found
        return found

    def models(self) -> dict[str, Mapping[str, Any]]:
        """Every model that a ready instance serves, with its /v1/models entry.

        In the instances' own order, since clients that name no model take the first.
        """
        found: dict[str, Mapping[str, Any]] = {}
        for instance in self.instances():
            if instance.state is State.READY:
                for name, card in instance.models.items():
                    found.setdefault(name, card)
        return found

    def has_model(self, name: str) -> bool:
        """Whether an instance in any state serves that model."""
        return any(name in instance.models for instance in self._instances.values())
