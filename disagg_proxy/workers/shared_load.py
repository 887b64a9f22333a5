"""The load on the instances over all workers, in the shared table.

The counts of an :class:`~disagg_proxy.cluster.instance.Instance` are this worker's own plus those of the others as of
the last :meth:`WorkerLoad.refresh`. A claim is written before the other rows are read. Of two workers that claim the
last capacity at the same time at least one therefore sees the other's claim; if both do, both withdraw and retry after
different pauses. They never both miss it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Set

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.lease import IN_FLIGHT, KV_WAITING, KV_WAITING_TOKENS
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.workers.shared_table import LOADS, SLOTS, RowHeader, SharedTable, now

_NO_LOAD = (0, 0, 0, 0, 0, 0)
_PAUSE = 0.001


class WorkerLoad:
    """One worker's view of the load (:class:`disagg_proxy.admission.queue.Peers`, cluster/lease.py).

    Args:
        freed: notifies the queues of other workers that capacity may be available.

    Attributes:
        pause: seconds before a withdrawn claim is retried, different in each worker.
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
        self._claimed: dict[int, int] | None = None
        self._pending: dict[int, int] = {}
        self._fence = threading.Lock()
        self.pause = _PAUSE * (worker + 1)
        registry.shared_load = self

    # -- slots

    def assign_slot(self, instance: Instance, slot: int) -> None:
        """Count the load of ``instance`` at ``slot``, instead of an earlier instance of the same address."""
        before = self._at.get(slot)
        if before is instance:
            return
        if instance.slot >= 0:
            self.release_slot(instance)
        self._at[slot] = instance
        self._used = max(self._used, slot + 1)
        for count, own in enumerate(_own(instance)):
            self._own[slot * LOADS + count] += own
        instance.slot = slot

    def release_slot(self, instance: Instance) -> None:
        """Take the load of ``instance`` out of the table: its slot is assigned to another address."""
        slot = instance.slot
        for count, own in enumerate(_own(instance)):
            self._own[slot * LOADS + count] -= own
        _set_elsewhere(instance, _NO_LOAD)
        if self._at.get(slot) is instance:
            del self._at[slot]
        instance.slot = -1

    # -- this worker's own load

    def add(self, instance: Instance, count: int, change: int) -> None:
        """Change a count of ``instance`` by a request of this worker."""
        if instance.slot < 0:
            return
        word = instance.slot * LOADS + count
        if self._claimed is None:
            self._own[word] += change
        else:
            self._pending[word] = self._pending.get(word, 0) + change

    def claim(self, instances: Collection[Instance], kv_tokens: int, fits: Callable[[], bool]) -> bool:
        """Claim capacity visibly to all workers, then check ``fits``; if it returns False, withdraw the claim."""
        claimed: dict[int, int] = {}
        for instance in instances:
            if instance.slot < 0:
                continue
            claimed[instance.slot * LOADS + IN_FLIGHT] = 1
            if instance.role is Role.DECODE and not instance.kind.computes:
                claimed[instance.slot * LOADS + KV_WAITING] = 1
                claimed[instance.slot * LOADS + KV_WAITING_TOKENS] = kv_tokens
        for word, size in claimed.items():
            self._own[word] += size
        # The lock is a memory barrier between the writes above and the reads below.
        with self._fence:
            pass
        self.refresh()
        if fits():
            self._claimed = claimed
            return True
        for word, size in claimed.items():
            self._own[word] -= size
        self._freed()
        return False

    def settle(self) -> None:
        """Replace the claim by what the request was actually counted with."""
        claimed, self._claimed = self._claimed or {}, None
        for word, size in claimed.items():
            self._pending[word] = self._pending.get(word, 0) - size
        for word, change in self._pending.items():
            if change:
                self._own[word] += change
        if any(change < 0 for change in self._pending.values()):
            self._freed()
        self._pending.clear()

    # -- load of other workers

    def refresh(self) -> None:
        """Update the counts of all instances by the load of the other workers."""
        used = self._used * LOADS
        rows = [row.loads[:used].tolist() for row in self._others]
        sums = rows[0] if len(rows) == 1 else [sum(column) for column in zip(*rows, strict=True)]
        for slot, instance in self._at.items():
            peer_counts = tuple(sums[slot * LOADS : (slot + 1) * LOADS])
            if peer_counts != instance.peer_counts:
                _set_elsewhere(instance, peer_counts)

    # -- queues

    def queue(self, waiting: int, oldest: float | None) -> None:
        """Publish the length of this worker's queue, and the lowest rank in it (monotonic seconds)."""
        self._head[RowHeader.OLDEST] = 0 if oldest is None else int(oldest * 1e9)
        self._head[RowHeader.WAITING] = waiting

    def waiting(self) -> int:
        """Requests queued in other workers that are responsive."""
        if not any(row.head[RowHeader.WAITING] for row in self._others):
            return 0
        time = now()
        return sum(row.head[RowHeader.WAITING] for row in self._others if row.is_alive(time))

    def has_older_waiter(self, since: float) -> bool:
        """Whether a request in another responsive worker has a lower rank than ``since``."""
        time, own = now(), int(since * 1e9)
        return any(0 < row.head[RowHeader.OLDEST] < own and row.is_alive(time) for row in self._others)


def _own(instance: Instance) -> tuple[int, int, int, int, int, int]:
    in_flight, direct_requests, kv_waiting, kv_tokens, answering, kv_committed = instance.peer_counts
    return (
        instance.in_flight - in_flight,
        instance.direct_requests - direct_requests,
        instance.kv_waiting - kv_waiting,
        instance.kv_waiting_tokens - kv_tokens,
        instance.answering - answering,
        instance.kv_committed - kv_committed,
    )


def _set_elsewhere(instance: Instance, new: tuple[int, ...]) -> None:
    old = instance.peer_counts
    instance.in_flight += new[0] - old[0]
    instance.direct_requests += new[1] - old[1]
    instance.kv_waiting += new[2] - old[2]
    instance.kv_waiting_tokens += new[3] - old[3]
    instance.answering += new[4] - old[4]
    instance.kv_committed += new[5] - old[5]
    instance.peer_counts = (new[0], new[1], new[2], new[3], new[4], new[5])


class RowIndex:
    """The slots of the instances, by HTTP endpoint. The supervisor assigns them."""

    def __init__(self, table: SharedTable) -> None:
        self._table = table
        self._slots: dict[str, int] = {}
        self._owners: dict[int, str] = {}

    def slot_of(self, key: str) -> int | None:
        """The slot of the instance with that key, newly assigned if necessary; None if all are in use."""
        slot = self._slots.get(key)
        if slot is None:
            slot = next((s for s in range(SLOTS) if s not in self._owners), None)
            if slot is None:
                return None
            self._slots[key] = slot
            self._owners[slot] = key
        return slot

    def keys(self) -> Set[str]:
        """The keys that have a slot."""
        return self._slots.keys()

    def free(self, key: str) -> bool:
        """Release the slot of ``key``. Returns False if it has none, or if the slot is still in use."""
        slot = self._slots.get(key)
        if slot is None or not self._table.is_unused(slot):
            return False
        del self._slots[key]
        del self._owners[slot]
        self._table.supervisor.clear_slot(slot)
        return True
