"""When another attempt is made, and on which instances. The rule and its reasons: docs/retry.md.

Another attempt always has a new request id: KV that an earlier prefill may have sent belongs to the earlier id.
Attempts are bounded, and only made while the client waits. The limits apply to them as to new requests: otherwise the
load of a dead decode would fill the buffer of the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from disagg_proxy.admission.queue import AdmissionQueue, Demand
from disagg_proxy.cluster.choice import PlacementPreference
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.selection import Selection
from disagg_proxy.connectors.base import Failure
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import EngineBusy, ProxyError

log = logging.getLogger(__name__)

_FIRST_PAUSE = 0.05
"""Seconds before the second attempt, doubled before each further one."""


class Retry:
    """The retry budget of one request.

    Args:
        computes: whether the first decode computes without KV; further attempts go to instances of the same kind.
        attempts: maximum number, including the first one.
    """

    __slots__ = ("_admission_queue", "_computes", "_demand", "_failed", "_left", "_pause", "_registry", "_selection")

    def __init__(
        self,
        admission_queue: AdmissionQueue,
        selection: Selection,
        registry: Registry,
        demand: Demand,
        computes: bool,
        attempts: int,
    ) -> None:
        self._admission_queue = admission_queue
        self._selection = selection
        self._registry = registry
        self._demand = demand
        self._computes = computes
        self._left = attempts - 1
        self._pause = _FIRST_PAUSE
        self._failed: frozenset[Instance] = frozenset()

    def possible(self, failed: Instance) -> bool:
        """Whether an attempt is left, and others than ``failed`` could serve the request."""
        return self._left > 0 and self._can_serve(self._all_failed() | {failed})

    async def next(self, failure: Failure, reply: Reply) -> Placement | None:
        """Wait for the back-off and for capacity. Returns the next placement, None when no attempt follows."""
        self._failed |= {failure.instance}
        if not _waits(reply) or self._left <= 0 or self._excluded(failure.suspect) is None:
            return None
        if isinstance(failure.error, EngineBusy) and failure.prefill:
            # A decode alone would take over the work of prefills that are busy, at the cost of all its streams.
            self._demand.preference = PlacementPreference.PAIR
            if self._excluded(None) is None:
                return None
        self._left -= 1
        await asyncio.sleep(self._pause)
        self._pause *= 2
        # Instances may have come and gone during the pause.
        excluded = self._excluded(failure.suspect)
        if excluded is None or not _waits(reply):
            return None
        log.info("%s failed a request; another attempt", failure.instance, extra={"request_id": reply.request_id})
        self._demand.excluded = excluded
        try:
            placement = await self._admission_queue.acquire(self._demand)
        except ProxyError:
            return None
        if not _waits(reply):
            placement.release()
            return None
        return placement

    def _excluded(self, suspect: Instance | None) -> Collection[Instance] | None:
        """The instances to exclude; None when the others cannot serve the request."""
        failed = self._all_failed()
        for excluded in (failed | {suspect}, failed) if suspect else (failed,):
            if self._can_serve(excluded):
                return excluded
        return None

    def _all_failed(self) -> set[Instance]:
        """Instances that failed, and those of the other kind."""
        return {*self._failed, *(i for i in self._registry.instances() if i.kind.computes is not self._computes)}

    def _can_serve(self, excluded: Collection[Instance]) -> bool:
        try:
            self._selection.check(self._demand.model, self._demand.preference, excluded)
        except ProxyError:
            return False
        return True


def _waits(reply: Reply) -> bool:
    """Whether the client still waits for an answer. May change during each await."""
    return reply.open
