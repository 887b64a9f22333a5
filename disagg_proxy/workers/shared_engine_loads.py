"""One worker reads the load of the engines for all (:class:`disagg_proxy.health.load_reader.LoadPeers`).

It is the responsive worker with the lowest number, so another one continues within two seconds when it dies. Readings
travel as messages of the supervisor's channels, of which only the newest for each engine is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

from disagg_proxy.cluster.engine_load import EngineLoad
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.workers.channel import Message
from disagg_proxy.workers.shared_table import RowHeader, SharedTable, now

LOAD = "load"
"""Kind of the message: key of the instance, then the fields of :class:`EngineLoad` in their order. Its time is valid in
every process: all use the machine's monotonic clock."""


class SharedEngineLoads:
    """One worker's part in it.

    Args:
        worker: number of this worker.
        broadcast: sends a message to all other workers.
    """

    def __init__(
        self, table: SharedTable, worker: int, registry: Registry, broadcast: Callable[[Message], None]
    ) -> None:
        self._workers = table.workers
        self._own = table.rows[worker]
        self._registry = registry
        self._broadcast = broadcast

    def reads_loads(self, needed: bool) -> bool:
        """Report whether this worker needs the load; whether any does, and this worker is the one that reads it."""
        self._own.head[RowHeader.LOADS_NEEDED] = needed
        time = now()
        alive = [row for row in self._workers if row is self._own or row.is_alive(time)]
        return alive[0] is self._own and any(row.head[RowHeader.LOADS_NEEDED] for row in alive)

    def share_load(self, instance: Instance) -> None:
        """Pass the reading of ``instance`` on to the other workers."""
        if instance.engine_load is not None:
            self._broadcast([LOAD, instance.key, *astuple(instance.engine_load)])

    def on_message(self, message: Message) -> None:
        """Take in a reading of another worker."""
        instance = self._registry.find(message[1])
        if instance is not None:
            instance.engine_load = EngineLoad(*message[2:])
