"""The load on the instances over all workers: this one's own is told, the others' is looked at.

An instance's counts are this worker's own and, as of the last :meth:`WorkerLoad.refresh`, the others'. A claim is
written before the others' rows are read, so of two workers that claim the last slot at the same time at least one sees
the other. Both may, and then both take it back and try again at different times; they never both miss it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Set

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.lease import IN_FLIGHT, KV_WAITING_BYTES
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.workers.shared_table import LOADS, SLOTS, SharedTable, SharedTableHeader, now

_NOTHING = (0, 0, 0, 0)
_PAUSE = 0.001


class WorkerLoad:
    """One worker's part of the table (:class:`disagg_proxy.admission.queue.Peers`, cluster/lease.py).

    Args:
        freed: tells those who wait in other workers that there may be room.
    """

    def __init__(self, table: SharedTable, worker: int, registry: Registry, freed: Callable[[], None]) -> None:
        own = table.rows[worker]
        self._head = own.head
        self._own = own.loads
        self._others = [row for row in table.workers if row is not own]
        self._registry = registry
        self._freed = freed
        self._used = 0
        self._at: dict[int, Instance] = {}
        self._prepaid: dict[int, int] | None = None
        self._meanwhile: dict[int, int] = {}
        self._fence = threading.Lock()
        self.pause = _PAUSE * (worker + 1)
        registry.shared_load = self

    # -- which instance is where

    def place(self, instance: Instance, slot: int) -> None:
        """``instance`` has a slot from now on, or a new one is in place of one that was there."""
        before = self._at.get(slot)
        if before is instance:
            return
        if instance.slot >= 0:
            self.remove(instance)
        self._at[slot] = instance
        self._used = max(self._used, slot + 1)
        for count, own in enumerate(_own(instance)):
            self._own[slot * LOADS + count] += own
        instance.slot = slot

    def remove(self, instance: Instance) -> None:
        """Its slot is somebody else's from now on."""
        slot = instance.slot
        for count, own in enumerate(_own(instance)):
            self._own[slot * LOADS + count] -= own
        _set_elsewhere(instance, _NOTHING)
        if self._at.get(slot) is instance:
            del self._at[slot]
        instance.slot = -1

    # -- this worker's own load

    def add(self, instance: Instance, count: int, change: int) -> None:
        """A count of ``instance`` has changed here."""
        if instance.slot < 0:
            return
        word = instance.slot * LOADS + count
        if self._prepaid is None:
            self._own[word] += change
        else:
            self._meanwhile[word] = self._meanwhile.get(word, 0) + change

    def claim(self, instances: Collection[Instance], kv_bytes: int, fits: Callable[[], bool]) -> bool:
        """Take places in sight of all; when ``fits`` then says no they are given back at once."""
        prepaid: dict[int, int] = {}
        for instance in instances:
            if instance.slot < 0:
                continue
            prepaid[instance.slot * LOADS + IN_FLIGHT] = 1
            if kv_bytes and instance.role is Role.DECODE and not instance.kind.computes:
                prepaid[instance.slot * LOADS + KV_WAITING_BYTES] = kv_bytes
        for word, size in prepaid.items():
            self._own[word] += size
        # An atomic operation between the writes and the reads: no processor puts them in another order around it.
        with self._fence:
            pass
        self.refresh()
        if fits():
            self._prepaid = prepaid
            return True
        for word, size in prepaid.items():
            self._own[word] -= size
        self._freed()
        return False

    def settle(self) -> None:
        """What was claimed is counted by now; write what it differs by."""
        prepaid, self._prepaid = self._prepaid or {}, None
        for word, size in prepaid.items():
            self._meanwhile[word] = self._meanwhile.get(word, 0) - size
        for word, change in self._meanwhile.items():
            if change:
                self._own[word] += change
        if any(change < 0 for change in self._meanwhile.values()):
            self._freed()
        self._meanwhile.clear()

    # -- the others'

    def refresh(self) -> None:
        """Bring the counts of all instances up to date."""
        used = self._used * LOADS
        rows = [row.loads[:used].tolist() for row in self._others]
        sums = rows[0] if len(rows) == 1 else [sum(column) for column in zip(*rows, strict=True)]
        for slot, instance in self._at.items():
            peer_counts = tuple(sums[slot * LOADS : (slot + 1) * LOADS])
            if peer_counts != instance.peer_counts:
                _set_elsewhere(instance, peer_counts)

    # -- queues

    def queue(self, waiting: int, oldest: float | None) -> None:
        """So many requests wait here; ``oldest`` is a reading of the monotonic clock."""
        self._head[SharedTableHeader.OLDEST] = 0 if oldest is None else int(oldest * 1e9)
        self._head[SharedTableHeader.WAITING] = waiting

    def waiting(self) -> int:
        """How many wait in workers that go round."""
        if not any(row.head[SharedTableHeader.WAITING] for row in self._others):
            return 0
        time = now()
        return sum(row.head[SharedTableHeader.WAITING] for row in self._others if row.lives(time))

    def has_older_waiter(self, since: float) -> bool:
        """Whether somebody in another such worker has waited since before ``since``."""
        time, mine = now(), int(since * 1e9)
        return any(0 < row.head[SharedTableHeader.OLDEST] < mine and row.lives(time) for row in self._others)


def _own(instance: Instance) -> tuple[int, int, int, int]:
    in_flight, direct_requests, kv_waiting, kv_bytes = instance.peer_counts
    return (
        instance.in_flight - in_flight,
        instance.direct_requests - direct_requests,
        instance.kv_waiting - kv_waiting,
        instance.kv_waiting_bytes - kv_bytes,
    )


def _set_elsewhere(instance: Instance, new: tuple[int, ...]) -> None:
    old = instance.peer_counts
    instance.in_flight += new[0] - old[0]
    instance.direct_requests += new[1] - old[1]
    instance.kv_waiting += new[2] - old[2]
    instance.kv_waiting_bytes += new[3] - old[3]
    instance.peer_counts = (new[0], new[1], new[2], new[3])


class RowIndex:
    """Which instance has which slot: the supervisor's to give out, by HTTP endpoint."""

    def __init__(self, table: SharedTable) -> None:
        self._table = table
        self._given: dict[str, int] = {}
        self._owner: dict[int, str] = {}

    def of(self, key: str) -> int | None:
        """The slot of the instance at that endpoint, a new one if need be; None when there is no room."""
        slot = self._given.get(key)
        if slot is None:
            slot = next((s for s in range(SLOTS) if s not in self._owner), None)
            if slot is None:
                return None
            self._given[key] = slot
            self._owner[slot] = key
        return slot

    def keys(self) -> Set[str]:
        """All endpoints that have one."""
        return self._given.keys()

    def free(self, key: str) -> bool:
        """Whether the slot could be taken back: nobody has anything on it."""
        slot = self._given.get(key)
        if slot is None or not self._table.unused(slot):
            return False
        del self._given[key]
        del self._owner[slot]
        self._table.supervisor.forget(slot)
        return True
