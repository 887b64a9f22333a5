"""The words that all processes of one proxy share: layout, and who may write what.

One row for each worker and a last one for the supervisor. Only its owner writes to a row; the supervisor clears the
row of a worker that has died. A word is a signed 64-bit number on an aligned address, so that it is read as it was
written. In a row: a head, then the load on each instance, then what is known of each instance. Instances have slots,
which the supervisor gives out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import IntEnum

SLOTS = 1024
"""As many as a registry has instances."""

LIVE_FOR = 2_000_000_000
"""Nanoseconds since its last beat after which a worker is not waited for any more."""

NEVER = 0
"""Of all words that hold a time: nanoseconds of the machine's monotonic clock."""


class SharedTableHeader(IntEnum):
    """Words of a worker as a whole.

    BEAT: when its event loop last went round. PID. INCARNATION: how many there were in its place. WAITING: requests
    in its queue; OLDEST: since when the first of them waits. CONNECTIONS of clients. WANTED: when it asked the others
    for their numbers; PUBLISHED: the newest such wish that it has fulfilled. READY: it serves. NEWS: how often it has
    changed a mark.
    """

    BEAT = 0
    PID = 1
    INCARNATION = 2
    WAITING = 3
    OLDEST = 4
    CONNECTIONS = 5
    WANTED = 6
    PUBLISHED = 7
    READY = 8
    NEWS = 9


class FlagColumn(IntEnum):
    """What a worker says of an instance.

    MOVES: parts of answers that it has got from it. FROZEN: when it found that its engine is stalled; MOVED: when it
    saw it move again, or end. ROUND: the FROZEN that it takes part in recovering from; DISTANCE: how unlikely its best
    candidate for a replay is, in nanoseconds, or NOTHING; TRIED: its replays in that round; GIVEN_UP: the round that it
    has given up. BLAMED: on a decode, one bit for each prefill that was stalled while sending to it. DRAINED and
    UNDRAINED: when an operator asked for it there; SEEN: the newest such wish that it acts by. HUNG: when it found that
    its process hangs.
    """

    MOVES = 0
    FROZEN = 1
    MOVED = 2
    ROUND = 3
    DISTANCE = 4
    TRIED = 5
    GIVEN_UP = 6
    BLAMED = 7
    DRAINED = 8
    UNDRAINED = 9
    SEEN = 10
    HUNG = 11


LOADS = 4
"""Counts of each instance, in the order of cluster/lease.py."""

_WORD = 8
_HEAD = 16
_MARKS = 16
_ROW = _HEAD + SLOTS * (LOADS + _MARKS)

INHERITED = (
    FlagColumn.FROZEN, FlagColumn.MOVED, FlagColumn.GIVEN_UP, FlagColumn.DRAINED, FlagColumn.UNDRAINED, FlagColumn.HUNG,
)  # fmt: skip
"""What outlives the worker that said it: the newest of all counts, whoever it is from."""


class Row:
    """The words of one process.

    Attributes:
        loads: :data:`LOADS` words for each slot, to be read and written as they are.
    """

    __slots__ = ("_marks", "_words", "head", "loads")

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self.head = words[:_HEAD]
        self.loads = words[_HEAD : _HEAD + SLOTS * LOADS]
        self._marks = words[_HEAD + SLOTS * LOADS :]

    def mark(self, slot: int, mark: FlagColumn) -> int:
        """One word about the instance at ``slot``."""
        return int(self._marks[slot * _MARKS + mark])

    def set_mark(self, slot: int, mark: FlagColumn, value: int) -> None:
        """Say something about the instance at ``slot``; the owner only."""
        self._marks[slot * _MARKS + mark] = value

    def forget(self, slot: int) -> None:
        """There is another instance at ``slot`` from now on, or none."""
        self.loads[slot * LOADS : (slot + 1) * LOADS] = memoryview(bytes(LOADS * _WORD)).cast("q")
        self._marks[slot * _MARKS : (slot + 1) * _MARKS] = memoryview(bytes(_MARKS * _WORD)).cast("q")

    def clear(self) -> None:
        """Everything to 0."""
        self._words[:] = memoryview(bytes(len(self._words) * _WORD)).cast("q")

    def lives(self, now: int) -> bool:
        """Whether its owner is there and goes round."""
        return now - int(self.head[SharedTableHeader.BEAT]) < LIVE_FOR


class SharedTable:
    """All rows.

    Args:
        memory: at least :meth:`size` bytes, zero at first.
        workers: how many; the row after theirs is the supervisor's.
    """

    def __init__(self, memory: memoryview, workers: int) -> None:
        words = memory[: self.size(workers)].cast("q")
        self.rows: Sequence[Row] = [Row(words[i * _ROW : (i + 1) * _ROW]) for i in range(workers + 1)]

    @staticmethod
    def size(workers: int) -> int:
        """Bytes of the table."""
        return (workers + 1) * _ROW * _WORD

    @property
    def workers(self) -> Sequence[Row]:
        """The rows of the workers."""
        return self.rows[:-1]

    @property
    def supervisor(self) -> Row:
        """The supervisor's row, which also keeps what dead workers have said."""
        return self.rows[-1]

    def newest(self, slot: int, mark: FlagColumn) -> int:
        """The newest word of anybody."""
        return max(row.mark(slot, mark) for row in self.rows)

    def bury(self, worker: int) -> None:
        """A worker has died: its load is gone, what it has found out is kept. The supervisor only."""
        dead, keeper = self.rows[worker], self.supervisor
        for slot in range(SLOTS):
            for mark in INHERITED:
                if (said := dead.mark(slot, mark)) > keeper.mark(slot, mark):
                    keeper.set_mark(slot, mark, said)
        dead.clear()

    def unused(self, slot: int) -> bool:
        """Whether nothing is on the instance at ``slot``, and nobody keeps it drained."""
        if any(any(row.loads[slot * LOADS : (slot + 1) * LOADS]) for row in self.rows):
            return False
        return self.newest(slot, FlagColumn.DRAINED) <= self.newest(slot, FlagColumn.UNDRAINED)


def now() -> int:
    """Nanoseconds of the clock that all processes of the machine share."""
    return time.monotonic_ns()
