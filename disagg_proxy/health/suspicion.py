"""Suspects within seconds that an engine is stalled.

The engine's own counters are polled about once a second while it owes an answer and sends no output. After
max(3 s, 5 times the predicted step) without a change it is *suspect*: new requests go to other instances, where there
are any. Nothing else follows, so a false suspicion costs little, and the first change ends it. Whether the engine is
stalled is decided by :mod:`disagg_proxy.health.stall_detector`, much later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry

log = logging.getLogger(__name__)

Counters = tuple[bytes, ...]


class Suspicion:
    """Observes all instances of a registry.

    Args:
        counters: reads an engine's counters: empty without any, None when it does not answer.
        progressed: called when an instance's output or counters have changed.
    """

    def __init__(
        self,
        registry: Registry,
        counters: Callable[[Instance], Awaitable[Counters | None]],
        progressed: Callable[[Instance], None],
    ) -> None:
        self._registry = registry
        self._counters = counters
        self._progressed = progressed
        self._seen: dict[Instance, Counters] = {}
        self._polls: dict[Instance, asyncio.Task[None]] = {}

    async def stop(self) -> None:
        """Cancel all polls."""
        polls = list(self._polls.values())
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)

    def check(self, instance: Instance, output: bool) -> None:
        """Observe ``instance`` now, or begin to.

        Args:
            output: whether there was output since the last check.
        """
        now, steps = self._registry.now(), instance.progress.steps
        if output:
            self._seen.pop(instance, None)
            self._observe(instance, True)
        elif instance.state is not State.READY or not self._watched(instance):
            self._seen.pop(instance, None)
            self._observe(instance, False)
        elif instance not in self._polls and steps.due(now):
            poll = asyncio.get_running_loop().create_task(self._poll(instance), name=f"counters {instance}")
            self._polls[instance] = poll
            poll.add_done_callback(lambda ended: self._polls.pop(instance, None))

    def _watched(self, instance: Instance) -> bool:
        # The decodes of requests of all workers show whether the proxy serves at all.
        return _owes(instance) or instance.answering > 0

    async def _poll(self, instance: Instance) -> None:
        progress, outputs = instance.progress, instance.progress.outputs
        counters = await self._counters(instance)
        if instance.progress is not progress or progress.outputs != outputs:
            return
        before = self._seen.get(instance)
        if counters:
            self._seen[instance] = counters
        if counters is None:
            # A process that does not answer at all may be suspected too, if it has counters.
            self._observe(instance, False, blind=before is None)
        else:
            self._observe(instance, before is not None and counters != before, blind=not counters)

    def _observe(self, instance: Instance, changed: bool, blind: bool = False) -> None:
        progress = instance.progress
        owes = _owes(instance) and not blind
        progress.steps.observe(self._registry.now(), owes, changed)
        if changed:
            self._progressed(instance)
        idle = progress.steps.idle
        limit = progress.steps.limit(progress.compute_seconds()) if idle else None
        suspect = limit is not None and idle > limit and instance.state is State.READY
        if suspect and not instance.suspect:
            log.warning(
                "%s is suspected to be stalled: no change for %.1f s; new requests go to others", instance, idle
            )
        elif instance.suspect and not suspect:
            log.info("%s is no longer suspected to be stalled", instance)
        self._registry.suspect(instance, suspect)


def _owes(instance: Instance) -> bool:
    return any(pending.waiting for pending in instance.progress.pending)
