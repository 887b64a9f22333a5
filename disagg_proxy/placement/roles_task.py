"""Moves the roles of engines at run time: decides once a second, and takes what an operator sets.

With several workers the responsive one with the lowest number decides, and all follow (:class:`RolePeers`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from disagg_proxy.cluster.assignment import Assignment, Cause
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.placement.roles import RoleController, RoleLimits
from disagg_proxy.placement.roles_figures import FiguresReader

_INTERVAL = 1.0
"""Seconds between two decisions."""


class RolePeers(Protocol):
    """The other workers of this proxy."""

    def decides_roles(self) -> bool:
        """Whether this worker decides for all."""

    def assign(self, instance: Instance, assignment: Assignment) -> None:
        """Make an assignment in all workers."""

    def prefill_wait(self, instance: Instance) -> float:
        """The longest :func:`disagg_proxy.placement.roles_figures.prefill_wait` of all workers."""


class Roles:
    """The roles of the instances of a registry.

    Args:
        wait: seconds that prompts wait for prefill on an instance.

    Attributes:
        automatic: whether instances without an operator's role are assigned one and moved by load. The loads that
            engines show (:attr:`Instance.engine_load`) are needed then.
        figures: reads what is decided on.
    """

    def __init__(
        self,
        registry: Registry,
        peers: RolePeers,
        wait: Callable[[Instance], float],
        automatic: bool,
        limits: RoleLimits,
    ) -> None:
        self._registry = registry
        self._peers = peers
        self.configure(automatic, limits)
        self.figures = FiguresReader(registry, wait).read
        self._task: asyncio.Task[None] | None = None

    def configure(self, automatic: bool, limits: RoleLimits) -> None:
        """Decide so from now on."""
        self.automatic = automatic
        self._controller = RoleController(limits)

    def start(self) -> None:
        """Decide once a second from now on."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="roles")

    async def stop(self) -> None:
        """Decide no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL)
            self.step(self._registry.now())

    def step(self, now: float) -> None:
        """Decide once, if this worker decides."""
        if not self._peers.decides_roles():
            # Another worker has decided in the meantime, and its moves are not known here.
            self._controller = RoleController(self._controller.limits)
            return
        if not self.automatic:
            self._release(now)
            return
        for key, assignment in self._controller.decide(now, self.figures(now)):
            if (instance := self._registry.find(key)) is not None:
                self._peers.assign(instance, assignment)

    def _release(self, now: float) -> None:
        """Undo what was assigned before a reload that ended it."""
        for instance in self._registry.instances():
            assignment = instance.assignment
            if assignment is not None and assignment.role is not None and not assignment.by_hand:
                self._peers.assign(instance, Assignment(None, Cause.ANNOUNCED, now))

    def set_by_hand(self, instance: Instance, role: Role | None) -> None:
        """Assign a role until further notice; None leaves it to the proxy again. Repeating it changes nothing."""
        now, current = self._registry.now(), instance.assignment
        if role is not None:
            if current is None or not current.by_hand or current.role is not role:
                self._peers.assign(instance, Assignment(role, Cause.BY_HAND, now))
        elif current is not None and current.by_hand:
            self._peers.assign(instance, Assignment(current.role if self.automatic else None, Cause.AUTO, now))
