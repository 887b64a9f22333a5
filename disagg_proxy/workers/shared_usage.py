"""What each worker has used of the limits of client keys, in shared memory, so that all workers keep one limit.

One row per worker, which only that worker writes: a word that identifies the list of keys, one that changes whenever
the counters begin at 0 again, and a counter for each limit. A reader adds up what the counters of the others have grown
by since it last looked. Rows of workers with another list of keys, during a reload, are left out: their counters belong
to other limits.
"""

from __future__ import annotations

from collections.abc import Sequence

from disagg_proxy.config.keys_file import MAX_KEYS

_LIST, _EPOCH, _COUNTERS = 0, 1, 2
_LIMITS = 2 * MAX_KEYS

ROW_BYTES = 8 * (_COUNTERS + _LIMITS)
"""Bytes of one row."""


class WorkerUsage:
    """The counters as one worker sees them (:class:`disagg_proxy.admission.client_key.SharedUsage`).

    Args:
        rows: :data:`ROW_BYTES` bytes for each worker, initially zero.
        worker: number of this worker.
    """

    def __init__(self, rows: Sequence[memoryview], worker: int) -> None:
        words = [row.cast("q") for row in rows]
        self._own = words[worker]
        self._others = [row for row in words if row is not self._own]
        self._list = 0
        self._epochs: list[int] = [0] * len(self._others)
        self._seen: list[list[int]] = [[] for _ in self._others]

    def use(self, keys: int) -> None:
        """Count for this list of keys from now on; what the others counted before is left out.

        Args:
            keys: identifies the list and its order; not 0.
        """
        if keys == self._list:
            return
        own = self._own
        if own[_LIST] != keys:
            # With the same list this is a replaced worker, which continues the counters of its predecessor.
            own[_LIST] = 0
            for slot in range(_COUNTERS, len(own)):
                own[slot] = 0
            own[_EPOCH] += 1
            own[_LIST] = keys
        self._list = keys
        for other, row in enumerate(self._others):
            same = row[_LIST] == keys
            self._epochs[other] = row[_EPOCH] if same else 0
            self._seen[other] = row[_COUNTERS:].tolist() if same else []

    def take(self, limit: int, amount: int) -> None:
        """This worker has used ``amount`` of the limit with this number; a negative one was given back."""
        self._own[_COUNTERS + limit] += amount

    def taken(self, limit: int) -> int:
        """What the others have used of it since the previous call."""
        total = 0
        for other, row in enumerate(self._others):
            if row[_LIST] != self._list:
                continue
            if row[_EPOCH] != self._epochs[other]:
                self._epochs[other], self._seen[other] = row[_EPOCH], [0] * _LIMITS
            seen, now = self._seen[other], row[_COUNTERS + limit]
            total += now - seen[limit]
            seen[limit] = now
        return total
