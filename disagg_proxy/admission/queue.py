"""Who may start, and who waits: the limits, and the bounded queue in front of them.

A burst of long prompts that goes straight to the engines fills decode's KV buffer and stops both of them, so it waits
here instead. Requests of one model keep their order; models take turns, so that one whose instances are busy does not
hold up another. When an operator drains the last instance that could serve them they wait on, since that ends; new
ones are told. A client that leaves the queue costs nothing; one that waits too long, or finds the queue full, gets 429.

With other processes of the same proxy beside it (:class:`Peers`) a request first claims its places, in sight of all,
and then looks whether the limits still hold; of two that claim the last place at the same time at least one sees the
other and takes its claim back. Whoever has waited longest goes first as far as that costs no more than a moment.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.cluster.policies import NO_TRAITS, Traits
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.selection import NoCapacity, PlacementPreference, Selection, SingleEngine
from disagg_proxy.errors import NoPair, Overloaded, ProxyError
from disagg_proxy.telemetry.stats import Stats

_WAY = 0.01
"""Seconds for which somebody who has waited longer in another process is let in first."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The configured bounds.

    Attributes:
        in_flight, prefill, decode: requests in all, and on one instance of each role.
        kv_buffer: bytes of KV that may wait on one decode (its kv_buffer_size).
        queue: requests that may wait; queue_timeout: for how many seconds.
    """

    in_flight: int = 0
    prefill: int = 0
    decode: int = 0
    kv_buffer: int = 0
    queue: int = 0
    queue_timeout: float = 60.0

    def has_room(self, instance: Instance, kv_bytes: int) -> bool:
        """Whether ``instance`` may get one more request, whose KV takes ``kv_bytes`` on decode.

        A prompt that is larger than the whole buffer goes to a decode on which nothing waits: waiting longer would
        not make it fit, and decode's pinned pool takes what the buffer does not.
        """
        most = self.prefill if instance.role is Role.PREFILL else self.decode
        if most and instance.in_flight >= most:
            return False
        if instance.role is Role.PREFILL or not self.kv_buffer or not instance.kv_waiting_bytes:
            return True
        if instance.kind.computes:
            # It has no buffer: KV comes straight into the blocks of a scheduled request.
            return True
        return instance.kv_waiting_bytes + kv_bytes <= self.kv_buffer


class Peers(Protocol):
    """The other processes of this proxy. Room that they give back is told by the registry's ``freed``."""

    def refresh(self) -> None:
        """Bring the counts of all instances up to date."""

    def claim(self, instances: Collection[Instance], kv_bytes: int, fits: Callable[[], bool]) -> bool:
        """Take places on ``instances`` in sight of all, unless ``fits`` says afterwards that there is no room."""

    def settle(self) -> None:
        """The claimed places are counted by now as what they are."""

    def queue(self, waiting: int, oldest: float | None) -> None:
        """So many wait here, the first of them since then."""

    def waiting(self) -> int:
        """How many wait elsewhere."""

    def waits_longer(self, since: float) -> bool:
        """Whether somebody elsewhere waits who came before ``since``."""

    @property
    def pause(self) -> float:
        """Seconds after which to try again when a claim was taken back; no two processes have the same."""


@dataclass(slots=True, eq=False)
class Demand:
    """What a request asks of the instances.

    Attributes:
        model: served name, None for the instances' default.
        wish: whether a pair, or a decode alone, may serve it.
        kv_bytes: what the prompt's KV takes on decode, in bytes; 0 when unknown.
        traits: what the policies may know of it.
        without: instances on which an earlier attempt failed. Such a request was admitted before, so it waits in front.
    """

    model: str | None
    preference: PlacementPreference
    kv_bytes: int = 0
    traits: Traits = NO_TRAITS
    without: Collection[Instance] = ()


@dataclass(slots=True, eq=False)
class _Waiter:
    """One request in the queue; ``admitted`` gets its placement, which holds its places already."""

    demand: Demand
    since: float
    admitted: asyncio.Future[Placement]


class AdmissionQueue:
    """Hands out pairs within the limits."""

    def __init__(
        self,
        selection: Selection,
        registry: Registry,
        limits: Limits,
        stats: Stats,
        admission_peers: Peers | None = None,
    ) -> None:
        self._selection = selection
        self._registry = registry
        self._limits = limits
        self._stats = stats
        self._admission_peers = admission_peers
        self._timer: asyncio.TimerHandle | None = None
        self._way_until: float | None = None
        self._queues: OrderedDict[str | None, deque[_Waiter]] = OrderedDict()
        self._pumping = False
        registry.watch(changed=lambda _: self._pump_soon(), freed=self._pump_soon)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(map(len, self._queues.values()))

    def try_acquire(self, demand: Demand) -> Placement | None:
        """Places on instances that have room now; None when the request has to :meth:`wait`.

        Raises:
            ProxyError: no pair, or an unknown model.
        """
        if demand.model not in self._queues and not self._waiting_elsewhere():
            return self._try(demand)
        self._selection.check(demand.model, demand.preference, demand.without)
        return None

    async def acquire(self, demand: Demand) -> Placement:
        """Places on instances: at once where there is room, else after a wait in the queue.

        Raises:
            ProxyError: no pair, an unknown model, a full queue, or a wait that took too long.
        """
        placement = self.try_acquire(demand)
        return placement if placement is not None else await self.wait(demand)

    def _no_place(self) -> Overloaded:
        self._stats.turned_away += 1
        return Overloaded(f"{self._limits.queue} requests are waiting already (MAX_QUEUE).")

    def _waiting_elsewhere(self) -> int:
        return 0 if self._admission_peers is None else self._admission_peers.waiting()

    async def wait(self, demand: Demand) -> Placement:
        """Places on instances, after a wait in the queue.

        Raises:
            ProxyError: see :meth:`acquire`.
        """
        waiter = _Waiter(demand, self._stats.clock(), asyncio.Future())
        if self.waiting + self._waiting_elsewhere() >= self._limits.queue:
            raise self._no_place()
        begun = waiter.since
        queue = self._queues.setdefault(demand.model, deque())
        (queue.appendleft if demand.without else queue.append)(waiter)
        if self._admission_peers is not None:
            self._tell()
            if self.waiting + self._admission_peers.waiting() > self._limits.queue:
                self._remove(waiter)
                raise self._no_place()
            # What was given back before they could know that somebody waits here.
            self._pump_soon()
        timer = asyncio.get_running_loop().call_later(self._limits.queue_timeout, self._late, waiter)
        try:
            return await waiter.admitted
        except asyncio.CancelledError:
            # The client left in the very moment in which its turn came.
            if waiter.admitted.done() and not waiter.admitted.cancelled() and not waiter.admitted.exception():
                waiter.admitted.result().release()
            raise
        finally:
            timer.cancel()
            self._remove(waiter)
            self._stats.queued.add(self._stats.clock() - begun)
            self._pump_soon()

    def _late(self, waiter: _Waiter) -> None:
        if not waiter.admitted.done():
            self._stats.turned_away += 1
            waited = f"{self._limits.queue_timeout:g} s"
            waiter.admitted.set_exception(Overloaded(f"The request waited for {waited} in vain (QUEUE_TIMEOUT)."))

    def _remove(self, waiter: _Waiter) -> None:
        queue = self._queues.get(waiter.demand.model)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
        if queue is not None and not queue:
            self._queues.pop(waiter.demand.model, None)
        self._tell()

    # -- the other processes

    def _tell(self) -> None:
        """How many wait here."""
        if self._admission_peers is not None:
            waiting = self.waiting
            self._admission_peers.queue(
                waiting, min(q[0].since for q in self._queues.values() if q) if waiting else None
            )

    def _later(self, seconds: float) -> None:
        """Look at the queue after so many seconds, whatever happens."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._pump_soon)

    def _gives_way(self) -> bool:
        """Whether somebody who waits elsewhere shall go first; for a moment, since he may wait for something else."""
        if self._admission_peers is None or not self._queues:
            return False
        oldest = min((q[0].since for q in self._queues.values() if q), default=0.0)
        now = self._stats.clock()
        if not self._admission_peers.waits_longer(oldest) or (
            self._way_until is not None and now > self._way_until - 0.001
        ):
            self._way_until = None
            return False
        if self._way_until is None:
            self._way_until = now + _WAY
            self._later(_WAY)
        return True

    # -- deciding

    def _try(self, demand: Demand) -> Placement | None:
        """Places if there is room now."""
        limits, admission_peers = self._limits, self._admission_peers
        if admission_peers is not None:
            admission_peers.refresh()
        if limits.in_flight and self._full():
            # An error that no wait can cure is raised at once all the same.
            self._selection.check(demand.model, demand.preference, demand.without)
            return None

        def room(instance: Instance) -> bool:
            return limits.has_room(instance, demand.kv_bytes)

        try:
            found = self._selection.place(demand.model, demand.preference, demand.without, room, demand.traits)
        except NoCapacity:
            return None
        if admission_peers is None:
            return Placement(self._registry, found, demand.kv_bytes)
        taken = [found.decode] if isinstance(found, SingleEngine) else [found.prefill, found.decode]
        if not admission_peers.claim(taken, demand.kv_bytes, lambda: not self._full() and all(map(room, taken))):
            self._later(admission_peers.pause)
            return None
        try:
            return Placement(self._registry, found, demand.kv_bytes)
        finally:
            admission_peers.settle()

    def _full(self) -> bool:
        """Whether there are as many requests on the instances as there may be in all."""
        most = self._limits.in_flight
        if not most:
            return False
        return self._registry.in_flight(Role.DECODE) >= most

    def _pump_soon(self) -> None:
        if self._queues and not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Let in whoever fits, one of each model in turn."""
        self._pumping = False
        if self._gives_way():
            return
        moved = True
        while moved:
            moved = False
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
                    moved = True
                    continue
                if placement is not None:
                    waiter.admitted.set_result(placement)
                    self._queues.move_to_end(model)
                    moved = True
        self._tell()
