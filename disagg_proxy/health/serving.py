"""Whether anything is answered: *not serving* is a state of the whole proxy, however healthy each instance looks.

Requests are in flight or queued, and no decode has sent output or changed its counters for longer than the learnt
deadline of stalls (FREEZE_AFTER_MIN, FREEZE_AFTER_MAX). It ends with the first change, or when no request is left.
"""

from __future__ import annotations

from collections.abc import Callable

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.registry import Registry


class ServingMonitor:
    """Judges by what is answered.

    Args:
        queued: requests that wait for capacity.
        shortest, longest: bounds on the learnt deadline, in seconds.
    """

    def __init__(self, registry: Registry, queued: Callable[[], int], shortest: float, longest: float) -> None:
        self._registry = registry
        self._queued = queued
        self.set_bounds(shortest, longest)
        self._since: float | None = None

    def set_bounds(self, shortest: float, longest: float) -> None:
        """Use these bounds from now on."""
        self._shortest = shortest
        self._longest = longest

    def progressed(self, instance: Instance) -> None:
        """An instance has sent output, or its counters have changed."""
        if (instance.role is Role.DECODE or instance.answering) and self._since is not None:
            self._since = self._registry.now()

    def check(self) -> None:
        """Note whether requests are in flight or queued; called about once a second."""
        if not self._requests():
            self._since = None
        elif self._since is None:
            self._since = self._registry.now()

    def not_serving(self) -> str:
        """Why the proxy is not serving; empty while it serves, or has nothing to serve."""
        if self._since is None:
            return ""
        idle, requests = self._registry.now() - self._since, self._requests()
        if not requests or idle <= self._deadline():
            return ""
        return f"{requests} requests are in flight or queued, and no decode has made progress for {idle:.0f} s"

    def _requests(self) -> int:
        return self._registry.answering() + self._queued()

    def _deadline(self) -> float:
        learnt = [
            i.progress.baseline.deadline(0, self._shortest, self._longest)
            for i in self._registry.instances()
            if i.progress.baseline.learnt
        ]
        return max(learnt, default=self._longest)
