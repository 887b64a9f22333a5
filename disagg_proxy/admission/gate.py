"""Who may start, and who waits: the limits, and the bounded queue in front of them.

A burst of long prompts that goes straight to the engines fills decode's KV buffer and stops both of them, so it waits
here instead. Requests of one model keep their order; models take turns, so that one whose instances are busy does not
hold up another. When an operator drains the last instance that could serve them they wait on, since that ends; new
ones are told. A client that leaves the queue costs nothing; one that waits too long, or finds the queue full, gets 429.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from disagg_proxy.admission.limits import Limits
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.pairing import Alone, NoRoom, Pair, Pairing, Wish
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.errors import NoPair, Overloaded, ProxyError
from disagg_proxy.stats import Stats


class Held(Protocol):
    """What holds the places of a request."""

    def give_back(self) -> None: ...


Make = Callable[[Pair | Alone], Held]
"""Takes the places on what was chosen."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """One request in the queue; ``admitted`` gets its legs, which hold their places already."""

    model: str | None
    wish: Wish
    kv_bytes: int
    make: Make
    without: Collection[Instance]
    admitted: asyncio.Future[Held]


class Gate:
    """Hands out pairs within the limits."""

    def __init__(self, pairing: Pairing, registry: Registry, limits: Limits, stats: Stats) -> None:
        self._pairing = pairing
        self._registry = registry
        self._limits = limits
        self._stats = stats
        self._queues: OrderedDict[str | None, deque[_Waiter]] = OrderedDict()
        self._pumping = False
        registry.watch(changed=lambda _: self._pump_soon(), freed=self._pump_soon)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(map(len, self._queues.values()))

    async def admit(
        self, model: str | None, wish: Wish, kv_bytes: int, make: Make, without: Collection[Instance] = ()
    ) -> Held:
        """What ``make`` makes of instances that have room, at once or after a wait in the queue.

        Args:
            wish: who shall serve it.
            kv_bytes: what the prompt's KV will take on decode, 0 when unknown.
            make: creates the legs, which takes their places.
            without: instances that the request has met in vain. It was admitted before, so it is next where it waits.

        Raises:
            ProxyError: no pair, an unknown model; Overloaded when the queue is full or the wait too long.
        """
        if model not in self._queues:
            legs = self._try(model, wish, kv_bytes, make, without)
            if legs is not None:
                return legs
        else:
            self._pairing.check(model, wish, without)
        if self.waiting >= self._limits.queue:
            self._stats.turned_away += 1
            raise Overloaded(f"{self._limits.queue} requests are waiting already (MAX_QUEUE).")
        return await self._wait(model, wish, kv_bytes, make, without)

    async def _wait(
        self, model: str | None, wish: Wish, kv_bytes: int, make: Make, without: Collection[Instance]
    ) -> Held:
        loop = asyncio.get_running_loop()
        waiter = _Waiter(model, wish, kv_bytes, make, without, loop.create_future())
        queue = self._queues.setdefault(model, deque())
        (queue.appendleft if without else queue.append)(waiter)
        begun = self._stats.clock()
        timer = loop.call_later(self._limits.queue_timeout, self._late, waiter)
        try:
            return await waiter.admitted
        except asyncio.CancelledError:
            # The client left in the very moment in which its turn came.
            if waiter.admitted.done() and not waiter.admitted.cancelled() and not waiter.admitted.exception():
                waiter.admitted.result().give_back()
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
        queue = self._queues.get(waiter.model)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
        if queue is not None and not queue:
            self._queues.pop(waiter.model, None)

    # -- deciding

    def _try(
        self, model: str | None, wish: Wish, kv_bytes: int, make: Make, without: Collection[Instance]
    ) -> Held | None:
        """Legs if there is room now."""
        limits = self._limits
        decodes = (i for i in self._registry.instances() if i.role is Role.DECODE)
        if limits.in_flight and sum(i.in_flight for i in decodes) >= limits.in_flight:
            # Still say at once what no wait can cure.
            self._pairing.check(model, wish, without)
            return None

        def room(instance: Instance) -> bool:
            return limits.has_room(instance, kv_bytes)

        try:
            return make(self._pairing.place(model, wish, without, room))
        except NoRoom:
            return None

    def _pump_soon(self) -> None:
        if self._queues and not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Let in whoever fits, one of each model in turn."""
        self._pumping = False
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
                    legs = self._try(model, waiter.wish, waiter.kv_bytes, waiter.make, waiter.without)
                except ProxyError as error:
                    if isinstance(error, NoPair) and error.drained:
                        continue
                    waiter.admitted.set_exception(error)
                    moved = True
                    continue
                if legs is not None:
                    waiter.admitted.set_result(legs)
                    self._queues.move_to_end(model)
                    moved = True
