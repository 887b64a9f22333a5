"""The table of words that all processes of one proxy share: its layout, and who may write what.

One row per worker, and a last one for the supervisor. Only its owner writes to a row; the supervisor clears the row of
a worker that has died. A word is an aligned signed 64-bit number, so it is never read half-written. A row consists of a
header, the load on each instance, and the flags of each instance. The supervisor assigns instances to slots.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import IntEnum

from disagg_proxy.cluster.assignment import unpack

SLOTS = 1024
"""Maximum number of instances, as in the registry."""

LIVE_FOR = 2_000_000_000
"""Nanoseconds since its last heartbeat after which a worker counts as unresponsive."""

NEVER = 0
"""Value of a time that is not set. Times are nanoseconds of the machine's monotonic clock."""


class RowHeader(IntEnum):
    """Words about a worker.

    HEARTBEAT: time of the last iteration of its event loop. PID. INCARNATION: processes started so far. WAITING:
    requests in its admission queue; OLDEST: the lowest rank of them (admission/queue.py), as a time. CONNECTIONS:
    clients. REQUESTED: time at which it requested the totals of all processes; PUBLISHED: the newest such request that
    it has fulfilled. READY: 1 while it serves. FLAG_CHANGES: counter of changes to its flags. LOADS_NEEDED: 1 while it
    needs the load that engines show (health/load_reader.py).
    """

    HEARTBEAT = 0
    PID = 1
    INCARNATION = 2
    WAITING = 3
    OLDEST = 4
    CONNECTIONS = 5
    REQUESTED = 6
    PUBLISHED = 7
    READY = 8
    FLAG_CHANGES = 9
    LOADS_NEEDED = 10


class FlagColumn(IntEnum):
    """Flags of one worker about one instance.

    PROGRESS: chunks received from it. FROZEN: time at which it was found stalled; RECOVERED: time at which it was seen
    to make progress again, or to end. ROUND: the FROZEN time of the recovery that this worker takes part in; DISTANCE:
    distance in nanoseconds of its best candidate for a replay (smaller is likelier), or NOTHING; REPLAYS: its replays
    in that round; GIVEN_UP: the round that it has given up. STALLED_SENDERS: on a decode, one bit for each prefill that
    stalled while sending to it. DRAINED, UNDRAINED: time of the operator's request to this worker; DRAIN_APPLIED: the
    newest such request of all workers that this worker has applied. HUNG: time at which its process was found hung.
    ROLE: the newest assignment of a role that this worker has made (cluster/assignment.py), 0 without one;
    ROLE_APPLIED: the newest one of all workers that this worker has applied. PREFILL_WAIT: milliseconds that prompts of
    this worker wait for prefill (placement/roles_figures.py).
    """

    PROGRESS = 0
    FROZEN = 1
    RECOVERED = 2
    ROUND = 3
    DISTANCE = 4
    REPLAYS = 5
    GIVEN_UP = 6
    STALLED_SENDERS = 7
    DRAINED = 8
    UNDRAINED = 9
    DRAIN_APPLIED = 10
    HUNG = 11
    ROLE = 12
    ROLE_APPLIED = 13
    PREFILL_WAIT = 14


LOADS = 6
"""Load counts of each instance, in the order of cluster/lease.py."""

_WORD = 8
_HEAD = 16
_FLAGS = 16
_ROW = _HEAD + SLOTS * (LOADS + _FLAGS)

INHERITED = (
    FlagColumn.FROZEN, FlagColumn.RECOVERED, FlagColumn.GIVEN_UP, FlagColumn.DRAINED, FlagColumn.UNDRAINED,
    FlagColumn.HUNG, FlagColumn.ROLE,
)  # fmt: skip
"""Flags that survive the worker that set them. The newest value of any row counts."""


class Row:
    """The words of one process.

    Attributes:
        head: indexed by :class:`RowHeader`.
        loads: :data:`LOADS` words for each slot.
    """

    __slots__ = ("_flags", "_words", "head", "loads")

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self.head = words[:_HEAD]
        self.loads = words[_HEAD : _HEAD + SLOTS * LOADS]
        self._flags = words[_HEAD + SLOTS * LOADS :]

    def flag(self, slot: int, column: FlagColumn) -> int:
        """A flag of the instance at ``slot``."""
        return int(self._flags[slot * _FLAGS + column])

    def set_flag(self, slot: int, column: FlagColumn, value: int) -> None:
        """Set a flag of the instance at ``slot``. Only for the owner of the row."""
        self._flags[slot * _FLAGS + column] = value

    def clear_slot(self, slot: int) -> None:
        """Zero the load and the flags of ``slot``, before another instance gets it."""
        self.loads[slot * LOADS : (slot + 1) * LOADS] = memoryview(bytes(LOADS * _WORD)).cast("q")
        self._flags[slot * _FLAGS : (slot + 1) * _FLAGS] = memoryview(bytes(_FLAGS * _WORD)).cast("q")

    def clear(self) -> None:
        """Zero the row."""
        self._words[:] = memoryview(bytes(len(self._words) * _WORD)).cast("q")

    def is_alive(self, now: int) -> bool:
        """Whether the event loop of its owner was running within the last 2 s."""
        return now - int(self.head[RowHeader.HEARTBEAT]) < LIVE_FOR


class SharedTable:
    """All rows.

    Args:
        memory: at least :meth:`size` bytes, initially zero.
        workers: number of workers.

    Attributes:
        rows: of the workers, and the supervisor's last.
    """

    def __init__(self, memory: memoryview, workers: int) -> None:
        words = memory[: self.size(workers)].cast("q")
        self.rows: Sequence[Row] = [Row(words[i * _ROW : (i + 1) * _ROW]) for i in range(workers + 1)]

    @staticmethod
    def size(workers: int) -> int:
        """Size of the table in bytes."""
        return (workers + 1) * _ROW * _WORD

    @property
    def workers(self) -> Sequence[Row]:
        """The rows of the workers."""
        return self.rows[:-1]

    @property
    def supervisor(self) -> Row:
        """The supervisor's row, which also keeps the flags of dead workers."""
        return self.rows[-1]

    def newest(self, slot: int, column: FlagColumn) -> int:
        """The highest value of a flag in all rows, which is the newest of a flag that holds a time."""
        return max(row.flag(slot, column) for row in self.rows)

    def retire(self, worker: int) -> None:
        """Drop the load of a dead worker and keep its :data:`INHERITED` flags. Only for the supervisor."""
        dead, keeper = self.rows[worker], self.supervisor
        for slot in range(SLOTS):
            for column in INHERITED:
                if (value := dead.flag(slot, column)) > keeper.flag(slot, column):
                    keeper.set_flag(slot, column, value)
        dead.clear()

    def is_unused(self, slot: int) -> bool:
        """Whether the instance at ``slot`` has no load in any process, and an operator has set nothing for it."""
        if any(any(row.loads[slot * LOADS : (slot + 1) * LOADS]) for row in self.rows):
            return False
        if (role := self.newest(slot, FlagColumn.ROLE)) and unpack(role).by_hand:
            return False
        return self.newest(slot, FlagColumn.DRAINED) <= self.newest(slot, FlagColumn.UNDRAINED)


def now() -> int:
    """Nanoseconds of the monotonic clock, which all processes of the machine share."""
    return time.monotonic_ns()
