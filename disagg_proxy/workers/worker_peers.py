"""How one worker communicates with the supervisor and the other workers."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping

from disagg_proxy.cluster.assignment import Assignment
from disagg_proxy.cluster.instance import NOT_PROBED, Instance, Role
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.discovery.announcement import decode
from disagg_proxy.peer_group import LocalProcess
from disagg_proxy.placement.roles_figures import prefill_wait
from disagg_proxy.runtime.within import within
from disagg_proxy.telemetry.aggregate import Overview, ProcessTotals, merge, unpack, unpack_retired
from disagg_proxy.telemetry.page_state import PageState
from disagg_proxy.telemetry.stats import RegistrationCounts
from disagg_proxy.workers.channel import Channel, Message, Wakeups
from disagg_proxy.workers.kv_history import SharedKvHistory
from disagg_proxy.workers.replay_log import message_name
from disagg_proxy.workers.shared_engine_loads import LOAD, SharedEngineLoads
from disagg_proxy.workers.shared_flags import SharedFlags
from disagg_proxy.workers.shared_load import WorkerLoad
from disagg_proxy.workers.shared_memory import MAX_SNAPSHOT, SharedMemory
from disagg_proxy.workers.shared_table import RowHeader, now
from disagg_proxy.workers.shared_usage import WorkerUsage
from disagg_proxy.workers.worker_process import WorkerEnv

log = logging.getLogger(__name__)

_HEARTBEAT = 0.25
"""Seconds between two heartbeats."""

_PAGE_STATE_INTERVAL = 4
"""Heartbeats between two publications of the page's state, for a worker that may have to replace this one."""

_TOTALS_TIMEOUT = 0.1
"""Seconds within which the other processes publish their totals on request."""

_SYNC_TIMEOUT, _PROBES_TIMEOUT = 5.0, 1.0
"""Seconds that a new worker waits for the supervisor's messages, and for its first probes."""

_APPLY_TIMEOUT = 0.25
"""Seconds that an operator's request waits for all workers to apply it."""


class SupervisorPings:
    """The worker's :class:`disagg_proxy.discovery.service.PingSource`: pings arrive as messages of the supervisor."""

    port = 0

    def __init__(self) -> None:
        self.traffic = RegistrationCounts()

    def start(self) -> None:
        return

    def stop(self) -> None:
        return


class WorkerPeers:
    """The peer group of one worker (:class:`disagg_proxy.peer_group.PeerGroup`).

    Args:
        env: what the supervisor has passed to this process.

    Attributes:
        on_settings: called with the configuration file's settings at each reload.
    """

    def __init__(self, env: WorkerEnv) -> None:
        self.worker = env.worker
        self._env = env
        self.pings = SupervisorPings()
        self._memory = SharedMemory(env.memory, env.workers)
        self._table = self._memory.table
        self.key_usage = WorkerUsage(self._memory.key_usage, env.worker)
        self._own = self._table.rows[env.worker]
        self._others = [row for row in self._table.rows if row is not self._own]
        self._wakeups = Wakeups(env.wakeups, env.worker)
        self._channel = Channel(socket.socket(fileno=env.channel), self._on_message, self._on_supervisor_gone)
        self._slots: dict[str, int] = {}
        self._synced, self._woken = asyncio.Event(), asyncio.Event()
        self._flag_changes = -1
        self._waking_queue = self._notifying = False
        self._heartbeats = 0
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self._stop_server: Callable[[bool], None] = lambda at_once: None
        self._clients: Callable[[], int] = lambda: 0
        self.on_settings: Callable[[Mapping[str, str]], None] = lambda file: None
        self._own.head[RowHeader.PID] = os.getpid()
        self._own.head[RowHeader.INCARNATION] = env.incarnation
        self._own.head[RowHeader.HEARTBEAT] = now()

    def join(self, registry: Registry, process: LocalProcess) -> None:
        """Share the load and the health of the instances in ``registry``."""
        self._registry = registry
        self._process = process
        self.admission_peers = WorkerLoad(self._table, self.worker, registry, self._notify_soon)
        self.peer_view = SharedFlags(self._table, self.worker, registry, self._notify_flags)
        self._kv_history = SharedKvHistory(
            registry, self._broadcast, lambda s, then: asyncio.get_running_loop().call_later(s, then)
        )
        self.load_peers = SharedEngineLoads(self._table, self.worker, registry, self._broadcast)
        registry.watch(changed=self._on_change, freed=self._notify_soon)

    def attach(self, stop: Callable[[bool], None], clients: Callable[[], int]) -> None:
        """Connect the HTTP server of this worker.

        Args:
            stop: begins the shutdown; True: without grace time.
            clients: returns the number of open connections.
        """
        self._stop_server, self._clients = stop, clients

    async def start(self) -> None:
        """Begin to exchange messages. Returns when this worker has what the others know, or after a time limit."""
        self._channel.open()
        self._wakeups.open(self._on_wakeup)
        self._heartbeat()
        try:
            async with within(_SYNC_TIMEOUT):
                await self._synced.wait()
            async with within(_PROBES_TIMEOUT):
                await self._probed()
        except asyncio.TimeoutError:
            log.info("Not every instance has responded to its first probe yet")

    def serving(self) -> None:
        """Report that this worker accepts clients from now on."""
        self._own.head[RowHeader.READY] = 1
        self._channel.send(["ready"])

    def stop(self) -> None:
        """Publish once more, then exchange no more messages; harmless before :meth:`start`."""
        if self._heartbeat_timer is not None:
            self._heartbeat_timer.cancel()
            self._publish_page_state()
            self._publish(self._own.head[RowHeader.PUBLISHED])
        self._wakeups.close()
        self._channel.close()

    # -- the supervisor

    def _broadcast(self, message: Message) -> None:
        self._channel.send(message, message_name(message))

    def _on_message(self, message: Message) -> None:
        if message[0] == "ping":
            announcement = decode([message[2]])
            self._assign_slot(announcement.http.netloc, message[1])
            self._process.announced([announcement])
        elif message[0] == "power":
            self._process.power_reports(message[1])
        elif message[0] == "slot":
            self._assign_slot(message[2], message[1])
        elif message[0] in ("sent", "ended"):
            self._kv_history.on_message(message)
        elif message[0] == LOAD:
            self.load_peers.on_message(message)
        elif message[0] == "synced":
            self._synced.set()
        elif message[0] == "settings":
            self.on_settings(message[1])
        elif message[0] in ("stop", "stop_now"):
            self._stop_server(message[0] == "stop_now")

    def _on_supervisor_gone(self) -> None:
        log.error("The supervisor has ended: shutting down")
        self._stop_server(False)

    def _assign_slot(self, key: str, slot: int) -> None:
        if self._slots.get(key) == slot:
            return
        before = next((k for k, s in self._slots.items() if s == slot), None)
        if before is not None:
            del self._slots[before]
            for instance in self._registry.instances():
                if instance.key == before:
                    self.admission_peers.release_slot(instance)
            self._own.clear_slot(slot)
        self._slots[key] = slot
        for instance in self._registry.instances():
            if instance.key == key:
                self._on_change(instance)

    def _on_change(self, instance: Instance) -> None:
        slot = self._slots.get(instance.key)
        if slot is not None and instance.slot != slot and self._registry.knows(instance):
            self.admission_peers.assign_slot(instance, slot)
            self.peer_view.apply_drain(instance)
            self.peer_view.apply_role(instance)

    async def _probed(self) -> None:
        while any(i.reason == NOT_PROBED for i in self._registry.instances()):
            await asyncio.sleep(0.01)

    # -- the other workers

    def _heartbeat(self) -> None:
        self._own.head[RowHeader.HEARTBEAT] = now()
        self._heartbeat_timer = asyncio.get_running_loop().call_later(_HEARTBEAT, self._heartbeat)
        self._apply_flags()
        self._report_prefill_waits()
        self._wake_queue()
        requested = max(row.head[RowHeader.REQUESTED] for row in self._table.rows)
        self._heartbeats += 1
        if not self._heartbeats % _PAGE_STATE_INTERVAL:
            self._publish_page_state()
        self._publish(requested)

    def _on_wakeup(self) -> None:
        self._woken.set()
        self._own.head[RowHeader.HEARTBEAT] = now()
        changes = sum(row.head[RowHeader.FLAG_CHANGES] for row in self._others)
        if changes != self._flag_changes:
            self._flag_changes = changes
            self._apply_flags()
        requested = max(row.head[RowHeader.REQUESTED] for row in self._table.rows)
        if requested > self._own.head[RowHeader.PUBLISHED]:
            requesting = [i for i, row in enumerate(self._table.rows) if row.head[RowHeader.REQUESTED] == requested]
            self._publish(requested)
            self._wakeups.wake(requesting)
        self._wake_queue()

    def _apply_flags(self) -> None:
        """Apply drains, roles and stalls that other workers have set."""
        for instance in self._registry.instances():
            if instance.slot >= 0:
                self.peer_view.apply_drain(instance)
                self.peer_view.apply_role(instance)
                self.peer_view.apply_recovery(instance)
        self._process.check_engines()

    def _notify_flags(self) -> None:
        self._own.head[RowHeader.FLAG_CHANGES] += 1
        self._wakeups.wake()

    def _wake_queue(self) -> None:
        """Let the queue of this worker check for capacity that another worker has released."""
        self._waking_queue = True
        try:
            self._registry.freed()
        finally:
            self._waking_queue = False

    def _notify_soon(self) -> None:
        """Wake the workers with a queue: this one has released capacity."""
        if self._waking_queue or self._notifying or not any(row.head[RowHeader.WAITING] for row in self._others):
            return
        self._notifying = True
        asyncio.get_running_loop().call_soon(self._notify_queues)

    def _notify_queues(self) -> None:
        self._notifying = False
        self._wakeups.wake([i for i, row in enumerate(self._table.workers) if row.head[RowHeader.WAITING]])

    # -- clients

    def _count_clients(self) -> int:
        clients = self._own.head[RowHeader.CONNECTIONS] = self._clients()
        return clients

    def others_first(self) -> bool:
        """Whether another responsive worker has fewer clients."""
        own, time = self._count_clients(), now()
        return any(
            row.head[RowHeader.READY] and row.head[RowHeader.CONNECTIONS] < own and row.is_alive(time)
            for row in self._table.workers
            if row is not self._own
        )

    # -- roles

    def decides_roles(self) -> bool:
        """Whether this is the responsive worker with the lowest number."""
        time = now()
        return not any(row.is_alive(time) for row in self._table.rows[: self.worker])

    def assign(self, instance: Instance, assignment: Assignment) -> None:
        """Assign a role to ``instance`` in all workers."""
        self.peer_view.assign(instance, assignment)

    def prefill_wait(self, instance: Instance) -> float:
        """Seconds that prompts wait for prefill on ``instance``: the longest of all workers."""
        return self.peer_view.prefill_wait(instance)

    def _report_prefill_waits(self) -> None:
        time = self._registry.now()
        for instance in self._registry.instances():
            if instance.slot >= 0 and instance.serves(Role.PREFILL):
                self.peer_view.report_prefill_wait(instance, prefill_wait(instance, time))

    async def assigned(self, instance: Instance) -> None:
        """Return when all workers have applied the newest assignment of ``instance``, or after a time limit."""
        await self._applied(lambda: self.peer_view.role_applied_by_all(instance), f"the role of {instance}")

    # -- drains and totals

    async def drain(self, instance: Instance, draining: bool) -> None:
        """Drain or undrain ``instance`` in all workers; returns when they have applied it, or after a time limit."""
        self.peer_view.drain(instance, draining)
        await self._applied(lambda: self.peer_view.drain_applied_by_all(instance), f"the drain of {instance}")

    async def _applied(self, by_all: Callable[[], bool], what: str) -> None:
        async def applied() -> None:
            while not by_all():
                self._woken.clear()
                await self._woken.wait()

        try:
            async with within(_APPLY_TIMEOUT):
                await applied()
        except asyncio.TimeoutError:
            log.warning("Not every worker has applied %s yet", what)

    def idle(self, instance: Instance) -> bool:
        """Whether ``instance`` is idle in all workers and, if it is drained, all of them have applied the drain."""
        self.admission_peers.refresh()
        return instance.idle and (not instance.draining or self.peer_view.drain_applied_by_all(instance))

    def _publish(self, requested: int) -> None:
        self._count_clients()
        if requested > self._own.head[RowHeader.PUBLISHED]:
            self._publish_page_state()
        part = ProcessTotals.from_overview(self._process.own_overview(), self._env.incarnation)
        self._memory.totals[self.worker].write(part.pack(MAX_SNAPSHOT))
        self._own.head[RowHeader.PUBLISHED] = max(requested, self._own.head[RowHeader.PUBLISHED])

    def _publish_page_state(self) -> None:
        self._memory.page_states[self.worker].write(self._process.own_page_state().pack(MAX_SNAPSHOT))

    def predecessor_state(self) -> PageState | None:
        """The last published state of the worker that this one replaces; None for the first process."""
        if self._env.incarnation == 1:
            return None
        return PageState.unpack(self._memory.page_states[self.worker].read())

    def page_states(self) -> list[PageState]:
        """The last published state of each worker; current after :meth:`overview`."""
        return [PageState.unpack(slot.read()) for slot in self._memory.page_states]

    async def overview(self) -> Overview:
        """The current totals of all processes; of an unresponsive one those that it published last."""
        requested = now()
        self._own.head[RowHeader.REQUESTED] = requested
        self._publish(requested)
        self._wakeups.wake()
        try:
            async with within(_TOTALS_TIMEOUT):
                await self._all_published(requested)
        except asyncio.TimeoutError:
            log.debug("Not every process has published its totals in time")
        parts = [unpack(slot.read()) for slot in self._memory.totals[:-1]]
        retired = unpack_retired(self._memory.totals[-1].read())
        if retired is None:
            raise RuntimeError("the supervisor has not published its totals yet")
        self.admission_peers.refresh()
        overview = merge(parts, retired)
        time = now()
        for worker, row, part in zip(overview.workers, self._table.workers, parts, strict=True):
            worker["responding"] = row.is_alive(time)
            worker["connections"] = row.head[RowHeader.CONNECTIONS]
            worker["in_flight"] = 0 if part is None or not row.head[RowHeader.PID] else part.stats["in_flight"]
        return overview

    async def _all_published(self, requested: int) -> None:
        while True:
            self._woken.clear()
            time = now()
            if all(row.head[RowHeader.PUBLISHED] >= requested for row in self._others if row.is_alive(time)):
                return
            await self._woken.wait()
