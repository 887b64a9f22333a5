"""The admission queue: requests get instances within the limits, or wait in a bounded queue.

A burst of long prompts that went straight to the engines would overfill decode's KV buffer and stall prefill and
decode, so it waits here instead. Requests of one model are FIFO, but each level of priority counts like an earlier
arrival by :data:`PRIORITY_SECONDS`: a request is overtaken only by those that arrive within that time for each level
between them, so no priority starves another; one that would miss its SLO wherever it went (PLACEMENT=elastic) goes
behind those that can meet theirs. Models are served round robin, so that a model whose instances are busy
does not block another. When an operator drains the last instance that could serve them, queued
requests wait on, and new ones get the error. Requests that wait too long, or find the queue full, get 429.

With other workers of the same proxy (:class:`Peers`) a request first claims its capacity, visible to all workers, and
then checks that the limits still hold. Of two workers that claim the last slot at the same time at least one sees the
other's claim and withdraws its own. The request that has waited longest over all workers, its priority counted, goes
first, within :data:`_YIELD_SECONDS`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from disagg_proxy.cluster.choice import NoCapacity, PlacementPreference, SingleEngine, Wish, WouldBeLate
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.cluster.policies import NO_TRAITS, Traits
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.selection import Selection
from disagg_proxy.errors import NoPair, Overloaded, ProxyError
from disagg_proxy.telemetry.stats import Stats

PRIORITY_SECONDS = 5.0
"""Seconds of waiting that one level of priority is worth."""

_MAX_PRIORITY = 9
"""Only so that ranks stay positive."""

_LATE = 1e6
"""Seconds by which a request that cannot meet its SLO counts as a later arrival."""

_FIRST = 1e-9
"""Rank of a request that was admitted before."""

_PREDICT_SECONDS = 0.05
"""Time after which requests that wait because of a prediction are decided again: it changes with time alone, and with
long answers nothing may be freed for seconds."""

_YIELD_SECONDS = 0.01
"""Time for which a request in another worker that has waited longer goes first."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The configured limits.

    Attributes:
        in_flight: concurrent requests of the proxy.
        prefill, decode: concurrent requests on one instance of that role.
        kv_tokens: prompt tokens whose KV may wait on one decode with a KV buffer; 0: the length of the longest prompt
            that it accepts.
        queue: requests that may wait in the queue.
        queue_timeout: seconds for which a request may wait there.
    """

    in_flight: int = 0
    prefill: int = 0
    decode: int = 0
    kv_tokens: int = 0
    queue: int = 0
    queue_timeout: float = 60.0

    def has_capacity(self, instance: Instance, kv_tokens: int, kv: int = 0) -> bool:
        """Whether ``instance`` may get one more request, whose prompt's KV takes ``kv_tokens`` in decode's KV buffer.

        One request is admitted where no other's KV waits, whatever its size: waiting longer would not make it fit, and
        decode's pinned memory pool takes what the buffer does not.

        Args:
            kv: tokens of KV that the request is expected to take until its end. An engine whose KV cache is full would
                let it wait, and prefill would drop the prompt's KV, so that it is computed twice.
        """
        if instance.role is Role.PREFILL:
            most = self.decode and instance.answering >= self.decode
            return not most and not (self.prefill and instance.in_flight >= self.prefill)
        if self.decode and instance.in_flight >= self.decode:
            return False
        if instance.kind.either_alone and not instance.kv_fits(kv):
            return False
        if instance.kind.computes or not instance.kv_waiting:
            # A decode that computes has no KV buffer: KV is loaded directly into the blocks of a scheduled request.
            return True
        return instance.kv_waiting_tokens + kv_tokens <= (self.kv_tokens or instance.max_model_len)


class Peers(Protocol):
    """The load and the queues of the other workers. Capacity that they free is notified by ``Registry.freed``."""

    def refresh(self) -> None:
        """Update the counts of all instances."""

    def claim(self, instances: Collection[Instance], kv_tokens: int, fits: Callable[[], bool]) -> bool:
        """Claim a request's capacity on ``instances``, visible to all workers; withdraw it if it does not fit."""

    def settle(self) -> None:
        """The leases that the claim stood for are counted now: replace it."""

    def queue(self, waiting: int, oldest: float | None) -> None:
        """Publish how many requests wait here, and the lowest rank (:class:`_Waiter`) of them in seconds."""

    def waiting(self) -> int:
        """Requests that wait in other workers."""

    def has_older_waiter(self, since: float) -> bool:
        """Whether a request in another worker has a lower rank than ``since``."""

    @property
    def pause(self) -> float:
        """Seconds until the next attempt after a withdrawn claim; different for each worker."""


@dataclass(slots=True, eq=False)
class Demand:
    """What a request needs of the instances.

    Attributes:
        model: served name, None for the instances' default.
        preference: whether a pair, or a decode alone, may serve it.
        kv_tokens: upper bound of the tokens of its KV on decode; 0 where no decode has a KV buffer.
        traits: what the policies may use of it.
        excluded: instances on which an earlier attempt failed. Such a request was admitted before, so it waits at the
            head of the queue.
        priority: higher ones leave the queue earlier; from 0 to 9.
        wish: what the decision where it is prefilled may use of it.
    """

    model: str | None
    preference: PlacementPreference
    kv_tokens: int = 0
    traits: Traits = NO_TRAITS
    excluded: Collection[Instance] = ()
    priority: int = 0
    wish: Wish = field(default_factory=Wish)


@dataclass(slots=True, eq=False)
class _Waiter:
    """A queued request.

    Attributes:
        since: clock reading when it began to wait.
        rank: the queue is sorted by it; ``since``, later by :data:`PRIORITY_SECONDS` for each level of priority below
            the highest.
        admitted: resolved with a placement that holds its leases already.
    """

    demand: Demand
    since: float
    rank: float
    admitted: asyncio.Future[Placement]


class AdmissionQueue:
    """Hands out placements within the limits."""

    def __init__(
        self,
        selection: Selection,
        registry: Registry,
        limits: Limits,
        stats: Stats,
        peers: Peers | None = None,
    ) -> None:
        self._selection = selection
        self._registry = registry
        self._limits = limits
        self._stats = stats
        self._peers = peers
        self._timer: asyncio.TimerHandle | None = None
        self._yield_until: float | None = None
        self._queues: OrderedDict[str | None, deque[_Waiter]] = OrderedDict()
        self._dispatch_scheduled = False
        registry.watch(changed=lambda _: self._dispatch_soon(), freed=self._dispatch_soon)

    def set_limits(self, limits: Limits) -> None:
        """Apply other limits from now on. Requests that wait already keep their timeout, and their place."""
        self._limits = limits
        self._dispatch_soon()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(map(len, self._queues.values()))

    def try_acquire(self, demand: Demand) -> Placement | None:
        """A placement on instances that have capacity now; None when the request has to :meth:`wait`.

        Raises:
            ProxyError: there is no pair, or the model is unknown.
        """
        if (demand.model not in self._queues or self._only_late(demand.model)) and not self._waiting_in_peers():
            return self._try(demand)
        self._selection.check(demand.model, demand.preference, demand.excluded)
        return None

    def _only_late(self, model: str | None) -> bool:
        """Whether every request that waits for ``model`` is one that cannot meet its SLO: others overtake it."""
        queue = self._queues[model]
        return bool(queue) and queue[0].rank >= _LATE

    async def acquire(self, demand: Demand) -> Placement:
        """A placement: at once where there is capacity, else after a wait in the queue.

        Raises:
            ProxyError: there is no pair, the model is unknown, the queue is full, or the wait took too long.
        """
        placement = self.try_acquire(demand)
        return placement if placement is not None else await self.wait(demand)

    def _queue_full(self) -> Overloaded:
        self._stats.turned_away += 1
        return Overloaded(f"{self._limits.queue} requests are waiting already (MAX_QUEUE).")

    def _waiting_in_peers(self) -> int:
        return 0 if self._peers is None else self._peers.waiting()

    async def wait(self, demand: Demand) -> Placement:
        """A placement, after a wait in the queue.

        Raises:
            ProxyError: see :meth:`acquire`.
        """
        now = self._stats.clock()
        rank = now + PRIORITY_SECONDS * (_MAX_PRIORITY - demand.priority) + _LATE * demand.wish.late
        waiter = _Waiter(demand, now, rank, asyncio.Future())
        if self.waiting + self._waiting_in_peers() >= self._limits.queue:
            raise self._queue_full()
        queue = self._queues.setdefault(demand.model, deque())
        if demand.excluded:
            waiter.rank = _FIRST
            queue.appendleft(waiter)
        else:
            _insert(queue, waiter)
        if self._peers is not None:
            self._publish()
            if self.waiting + self._peers.waiting() > self._limits.queue:
                self._remove(waiter)
                raise self._queue_full()
            # Capacity that was freed before the other workers could know that a request waits here.
            self._dispatch_soon()
        if self._selection.chooser is not None:
            self._dispatch_in(_PREDICT_SECONDS)
        seconds = self._limits.queue_timeout
        timer = asyncio.get_running_loop().call_later(seconds, self._on_timeout, waiter, seconds)
        try:
            return await waiter.admitted
        except asyncio.CancelledError:
            # The client disconnected in the same event loop iteration in which the request was admitted.
            if waiter.admitted.done() and not waiter.admitted.cancelled() and not waiter.admitted.exception():
                waiter.admitted.result().release()
            raise
        finally:
            timer.cancel()
            self._remove(waiter)
            self._stats.queued.add(self._stats.clock() - waiter.since)
            self._dispatch_soon()

    def _on_timeout(self, waiter: _Waiter, seconds: float) -> None:
        if not waiter.admitted.done():
            self._stats.turned_away += 1
            waiter.admitted.set_exception(Overloaded(f"No instance had capacity within {seconds:g} s (QUEUE_TIMEOUT)."))

    def _remove(self, waiter: _Waiter) -> None:
        queue = self._queues.get(waiter.demand.model)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
        if queue is not None and not queue:
            self._queues.pop(waiter.demand.model, None)
        self._publish()

    # -- the other workers

    def _publish(self) -> None:
        """Publish this worker's queue to the others."""
        if self._peers is not None:
            waiting = self.waiting
            self._peers.queue(waiting, min(q[0].rank for q in self._queues.values() if q) if waiting else None)

    def _dispatch_in(self, seconds: float) -> None:
        """Dispatch after ``seconds``, without waiting for freed capacity."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._dispatch_soon)

    def _yields(self) -> bool:
        """Whether an older request in another worker goes first; only briefly, since it may need other instances."""
        if self._peers is None or not self._queues:
            return False
        oldest = min((q[0].rank for q in self._queues.values() if q), default=0.0)
        now = self._stats.clock()
        if not self._peers.has_older_waiter(oldest) or (
            self._yield_until is not None and now > self._yield_until - 0.001
        ):
            self._yield_until = None
            return False
        if self._yield_until is None:
            self._yield_until = now + _YIELD_SECONDS
            self._dispatch_in(_YIELD_SECONDS)
        return True

    # -- dispatching

    def _try(self, demand: Demand) -> Placement | None:
        """A placement if there is capacity now."""
        limits, peers = self._limits, self._peers
        if peers is not None:
            peers.refresh()
        if limits.in_flight and self._full():
            # Errors that do not depend on capacity are raised at once.
            self._selection.check(demand.model, demand.preference, demand.excluded)
            return None

        def has_capacity(instance: Instance) -> bool:
            return limits.has_capacity(instance, demand.kv_tokens, wish.kv)

        wish = demand.wish
        try:
            found = self._selection.place(
                demand.model, demand.preference, demand.excluded, has_capacity, demand.traits, wish
            )
        except NoCapacity as why:
            wish.late = wish.late or isinstance(why, WouldBeLate)
            return None
        if peers is None:
            return Placement(self._registry, found, demand.kv_tokens, wish.kv, wish.output)
        taken = [found.engine] if isinstance(found, SingleEngine) else [found.prefill, found.decode]
        if not peers.claim(taken, demand.kv_tokens, lambda: not self._full() and all(map(has_capacity, taken))):
            self._dispatch_in(peers.pause)
            return None
        try:
            return Placement(self._registry, found, demand.kv_tokens, wish.kv, wish.output)
        finally:
            peers.settle()

    def _full(self) -> bool:
        """Whether the proxy has reached its limit of concurrent requests."""
        limit = self._limits.in_flight
        return limit > 0 and self._registry.answering() >= limit

    def _dispatch_soon(self) -> None:
        if self._queues and not self._dispatch_scheduled:
            self._dispatch_scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Admit queued requests while there is capacity, round robin over the models."""
        self._dispatch_scheduled = False
        if self._yields():
            return
        admitted = True
        while admitted:
            admitted = False
            for model in list(self._queues):
                queue = self._queues.get(model)
                while queue and queue[0].admitted.done():
                    queue.popleft()
                if not queue:
                    self._queues.pop(model, None)
                    continue
                waiter = queue[0]
                try:
                    placement = self._try(waiter.demand)
                except ProxyError as error:
                    if isinstance(error, NoPair) and error.drained:
                        continue
                    waiter.admitted.set_exception(error)
                    admitted = True
                    continue
                if placement is not None:
                    waiter.admitted.set_result(placement)
                    self._queues.move_to_end(model)
                    admitted = True
                elif waiter.demand.wish.late and waiter.rank < _LATE and not waiter.demand.excluded:
                    queue.popleft()
                    waiter.rank += _LATE
                    _insert(queue, waiter)
                    admitted = True
        if self._queues and self._selection.chooser is not None:
            self._dispatch_in(_PREDICT_SECONDS)
        self._publish()


def _insert(queue: deque[_Waiter], waiter: _Waiter) -> None:
    """Queue ``waiter`` behind all of its rank or a lower one; the last place is looked at first."""
    place = len(queue)
    for other in reversed(queue):
        if other.rank <= waiter.rank:
            break
        place -= 1
    queue.insert(place, waiter)
