"""One worker among the others: everything that it tells them, hears from them, and asks them."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable

from disagg_proxy.cluster.instance import NOT_PROBED, Instance
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.discovery.announcement import decode
from disagg_proxy.peer_group import LocalProcess
from disagg_proxy.runtime.within import within
from disagg_proxy.telemetry.aggregate import Overview, ProcessTotals, merge, unpack, unpack_retired
from disagg_proxy.telemetry.page_state import PageState
from disagg_proxy.telemetry.stats import RegistrationCounts
from disagg_proxy.workers.channel import Channel, Message
from disagg_proxy.workers.kv_history import SharedKvHistory
from disagg_proxy.workers.replay_log import name_of
from disagg_proxy.workers.shared_flags import SharedFlags
from disagg_proxy.workers.shared_load import WorkerLoad
from disagg_proxy.workers.shared_memory import SharedMemory
from disagg_proxy.workers.shared_table import SharedTableHeader, now
from disagg_proxy.workers.snapshot_slot import HALF
from disagg_proxy.workers.wakeup import Wakeups
from disagg_proxy.workers.worker_env import WorkerEnv

log = logging.getLogger(__name__)

_BEAT = 0.25
_ANSWER = 0.1
"""Seconds between two beats, and those that others get to publish their numbers when they are asked."""

_NEWS_BEATS = 4
"""Beats after which the news are published though nobody asked: for the worker that may take this one's place."""

_TABLE_WITHIN, _PROBES_WITHIN, _FOLLOW_WITHIN = 5.0, 1.0, 0.25
"""Seconds that a new worker waits for what the supervisor knows, and for the probes of that; and that an operator waits
for all workers to have heard."""


class SupervisorPings:
    """Stands in for the listener, which is the supervisor's (discovery/service.py, ``Pings``)."""

    port = 0

    def __init__(self) -> None:
        self.traffic = RegistrationCounts()

    def start(self) -> None:
        return

    def stop(self) -> None:
        return


class WorkerPeers:
    """This worker's part of the peer group (:class:`disagg_proxy.peer_group.PeerGroup`)."""

    def __init__(self, seat: WorkerEnv) -> None:
        self.worker = seat.worker
        self._seat = seat
        self.pings = SupervisorPings()
        self._memory = SharedMemory(seat.memory, seat.workers)
        self._table = self._memory.table
        self._own = self._table.rows[seat.worker]
        self._others = [row for row in self._table.rows if row is not self._own]
        self._pokes = Wakeups(seat.pokes, seat.worker)
        self._channel = Channel(socket.socket(fileno=seat.channel), self._take, self._orphaned)
        self._slots: dict[str, int] = {}
        self._whole, self._poked = asyncio.Event(), asyncio.Event()
        self._news = -1
        self._hearing = self._freeing = False
        self._beats = 0
        self._beat_timer: asyncio.TimerHandle | None = None
        self._stop_server: Callable[[bool], None] = lambda at_once: None
        self._clients: Callable[[], int] = lambda: 0
        self._own.head[SharedTableHeader.PID] = os.getpid()
        self._own.head[SharedTableHeader.INCARNATION] = seat.incarnation
        self._own.head[SharedTableHeader.BEAT] = now()

    def join(self, registry: Registry, process: LocalProcess) -> None:
        """Share the load and the health of the instances in ``registry``."""
        self._registry = registry
        self._process = process
        self.admission_peers = WorkerLoad(self._table, self.worker, registry, self._free_soon)
        self.peer_view = SharedFlags(self._table, self.worker, registry, self._tell_news)
        self._contacts = SharedKvHistory(
            registry, self._say, lambda s, then: asyncio.get_running_loop().call_later(s, then)
        )
        registry.watch(changed=self._on_change, freed=self._free_soon)

    def attach(self, stop: Callable[[bool], None], clients: Callable[[], int]) -> None:
        """Connect the HTTP server of this worker.

        Args:
            stop: begins the shutdown; True: without grace time.
            clients: counts the open connections.
        """
        self._stop_server, self._clients = stop, clients

    async def start(self) -> None:
        """Begin to exchange messages. Returns when this worker has what the others know, or after a time limit."""
        self._channel.open()
        self._pokes.open(self._on_poke)
        self._beat()
        try:
            async with within(_TABLE_WITHIN):
                await self._whole.wait()
            async with within(_PROBES_WITHIN):
                await self._probed()
        except asyncio.TimeoutError:
            log.info("Not every instance has answered its first probe yet")

    def serving(self) -> None:
        """Clients are served from now on."""
        self._own.head[SharedTableHeader.READY] = 1
        self._channel.send(["ready"])

    def stop(self) -> None:
        """Publish once more, then exchange no more messages; harmless before :meth:`start`."""
        if self._beat_timer is not None:
            self._beat_timer.cancel()
            self._publish_news()
            self._publish(self._own.head[SharedTableHeader.PUBLISHED])
        self._pokes.close()
        self._channel.close()

    # -- the supervisor

    def _say(self, message: Message) -> None:
        self._channel.send(message, name_of(message))

    def _take(self, message: Message) -> None:
        if message[0] == "ping":
            announcement = decode([message[2]])
            self._place(announcement.http.netloc, message[1])
            self._process.announced([announcement])
        elif message[0] == "slot":
            self._place(message[2], message[1])
        elif message[0] in ("sent", "ended"):
            self._contacts.heard(message)
        elif message[0] == "whole":
            self._whole.set()
        elif message[0] in ("stop", "hurry"):
            self._stop_server(message[0] == "hurry")

    def _orphaned(self) -> None:
        log.error("The supervisor is gone")
        self._stop_server(False)

    def _place(self, key: str, slot: int) -> None:
        if self._slots.get(key) == slot:
            return
        before = next((k for k, s in self._slots.items() if s == slot), None)
        if before is not None:
            del self._slots[before]
            for instance in self._registry.instances():
                if instance.key == before:
                    self.admission_peers.remove(instance)
            self._own.forget(slot)
        self._slots[key] = slot
        for instance in self._registry.instances():
            if instance.key == key:
                self._on_change(instance)

    def _on_change(self, instance: Instance) -> None:
        slot = self._slots.get(instance.key)
        if slot is not None and instance.slot != slot and self._registry.knows(instance):
            self.admission_peers.place(instance, slot)
            self.peer_view.follow_drain(instance)

    async def _probed(self) -> None:
        while any(i.reason == NOT_PROBED for i in self._registry.instances()):
            await asyncio.sleep(0.01)

    # -- the other workers

    def _beat(self) -> None:
        self._own.head[SharedTableHeader.BEAT] = now()
        self._beat_timer = asyncio.get_running_loop().call_later(_BEAT, self._beat)
        self._follow()
        self._hear_freed()
        wanted = max(row.head[SharedTableHeader.WANTED] for row in self._table.rows)
        self._beats += 1
        if not self._beats % _NEWS_BEATS:
            self._publish_news()
        self._publish(wanted)

    def _on_poke(self) -> None:
        self._poked.set()
        self._own.head[SharedTableHeader.BEAT] = now()
        news = sum(row.head[SharedTableHeader.NEWS] for row in self._others)
        if news != self._news:
            self._news = news
            self._follow()
        wanted = max(row.head[SharedTableHeader.WANTED] for row in self._table.rows)
        if wanted > self._own.head[SharedTableHeader.PUBLISHED]:
            asking = [i for i, row in enumerate(self._table.rows) if row.head[SharedTableHeader.WANTED] == wanted]
            self._publish(wanted)
            self._pokes.poke(asking)
        self._hear_freed()

    def _follow(self) -> None:
        """Do what others have found or asked for."""
        for instance in self._registry.instances():
            if instance.slot >= 0:
                self.peer_view.follow_drain(instance)
                self.peer_view.follow_thaw(instance)
        self._process.check_engines()

    def _tell_news(self) -> None:
        self._own.head[SharedTableHeader.NEWS] += 1
        self._pokes.poke()

    def _hear_freed(self) -> None:
        """There may be room: those who wait here shall look."""
        self._hearing = True
        try:
            self._registry.freed()
        finally:
            self._hearing = False

    def _free_soon(self) -> None:
        """There is room here that others may wait for."""
        if self._hearing or self._freeing or not any(row.head[SharedTableHeader.WAITING] for row in self._others):
            return
        self._freeing = True
        asyncio.get_running_loop().call_soon(self._tell_freed)

    def _tell_freed(self) -> None:
        self._freeing = False
        self._pokes.poke([i for i, row in enumerate(self._table.workers) if row.head[SharedTableHeader.WAITING]])

    # -- clients

    def _count_clients(self) -> int:
        clients = self._own.head[SharedTableHeader.CONNECTIONS] = self._clients()
        return clients

    def ahead(self) -> bool:
        """Whether another worker that goes round has fewer clients."""
        mine, time = self._count_clients(), now()
        return any(
            row.head[SharedTableHeader.READY] and row.head[SharedTableHeader.CONNECTIONS] < mine and row.lives(time)
            for row in self._table.workers
            if row is not self._own
        )

    # -- operators and numbers

    async def drain(self, instance: Instance, draining: bool) -> None:
        """As the registry's, on all workers; returns when they have heard, or after a moment."""
        self.peer_view.drain(instance, draining)

        async def heard() -> None:
            while not self.peer_view.all_follow(instance):
                self._poked.clear()
                await self._poked.wait()

        try:
            async with within(_FOLLOW_WITHIN):
                await heard()
        except asyncio.TimeoutError:
            log.warning("Not every worker has heard of the drain of %s yet", instance)

    def idle(self, instance: Instance) -> bool:
        """Whether it is idle on all workers, and will be as long as it is drained."""
        self.admission_peers.refresh()
        return instance.idle and (not instance.draining or self.peer_view.all_follow(instance))

    def _publish(self, preference: int) -> None:
        self._count_clients()
        if preference > self._own.head[SharedTableHeader.PUBLISHED]:
            self._publish_news()
        part = ProcessTotals.from_overview(self._process.own_overview(), self._seat.incarnation)
        self._memory.areas[self.worker].write(part.pack(HALF))
        self._own.head[SharedTableHeader.PUBLISHED] = max(preference, self._own.head[SharedTableHeader.PUBLISHED])

    def _publish_news(self) -> None:
        self._memory.news[self.worker].write(self._process.own_page_state().pack(HALF))

    def predecessor_state(self) -> PageState | None:
        """What the worker that this one replaces has published last; None where it replaces none."""
        if self._seat.incarnation == 1:
            return None
        return PageState.unpack(self._memory.news[self.worker].read())

    def page_states(self) -> list[PageState]:
        """What all have published last, which is new behind :meth:`overview`."""
        return [PageState.unpack(area.read()) for area in self._memory.news]

    async def overview(self) -> Overview:
        """The numbers of all, as they are now; of a process that does not answer, as it published them last."""
        preference = now()
        self._own.head[SharedTableHeader.WANTED] = preference
        self._publish(preference)
        self._pokes.poke()
        try:
            async with within(_ANSWER):
                await self._answered(preference)
        except asyncio.TimeoutError:
            log.debug("Not every process has published its numbers in time")
        parts = [unpack(area.read()) for area in self._memory.areas[:-1]]
        ground = unpack_retired(self._memory.areas[-1].read())
        if ground is None:
            raise RuntimeError("the supervisor has not published anything")
        self.admission_peers.refresh()
        whole = merge(parts, ground)
        time = now()
        for worker, row, part in zip(whole.workers, self._table.workers, parts, strict=True):
            worker["responding"] = row.lives(time)
            worker["connections"] = row.head[SharedTableHeader.CONNECTIONS]
            worker["in_flight"] = 0 if part is None or not row.head[SharedTableHeader.PID] else part.stats["in_flight"]
        return whole

    async def _answered(self, preference: int) -> None:
        while True:
            self._poked.clear()
            time = now()
            if all(row.head[SharedTableHeader.PUBLISHED] >= preference for row in self._others if row.lives(time)):
                return
            await self._poked.wait()
