"""The shared memory of one proxy: its layout, and slots in which a process publishes a text for all others.

It holds the table (shared_table.py), one slot per process for its totals (telemetry/aggregate.py), the supervisor's
last, one more per worker for the page's state (telemetry/page_state.py), and a row per worker for the limits of client
keys (shared_usage.py).
"""

from __future__ import annotations

import mmap
import os
import tempfile
import zlib

from disagg_proxy.workers.shared_table import SharedTable
from disagg_proxy.workers.shared_usage import ROW_BYTES

MAX_SNAPSHOT = 1024 * 1024
"""Bytes of a published text; the counters of 500 client keys take up to 400 KB. Unused memory costs nothing."""

_HEAD = 64
_TRIES = 8

SLOT_SIZE = _HEAD + 2 * MAX_SNAPSHOT
"""Bytes of a :class:`SnapshotSlot`."""


class SnapshotSlot:
    """The newest published text of one writer, for any number of readers in other processes.

    Two halves: the writer fills the one that is not current, then switches with the write of one word. A writer that is
    stopped or killed in between leaves the current half intact. A reader detects by a checksum that the writer has
    overwritten the half it was reading, and reads again.

    Args:
        memory: :data:`SLOT_SIZE` bytes, initially zero.
    """

    def __init__(self, memory: memoryview) -> None:
        self._head = memory[:_HEAD].cast("q")
        self._halves = [memory[_HEAD + i * MAX_SNAPSHOT : _HEAD + (i + 1) * MAX_SNAPSHOT] for i in (0, 1)]

    def write(self, text: bytes) -> None:
        """Publish ``text``. Only one process may write.

        Raises:
            ValueError: ``text`` is longer than :data:`MAX_SNAPSHOT`.
        """
        if len(text) > MAX_SNAPSHOT:
            raise ValueError(f"{len(text)} bytes do not fit into {MAX_SNAPSHOT}")
        generation = self._head[0] + 1
        half = generation & 1
        self._halves[half][: len(text)] = text
        self._head[2 + 2 * half] = len(text)
        self._head[3 + 2 * half] = zlib.crc32(text)
        self._head[0] = generation

    def read(self) -> bytes:
        """The text published last; empty if there is none, or if the writer overtook eight reads in a row."""
        for _ in range(_TRIES):
            generation = self._head[0]
            if not generation:
                return b""
            half = generation & 1
            length = self._head[2 + 2 * half]
            if not 0 <= length <= MAX_SNAPSHOT:
                continue
            text = bytes(self._halves[half][:length])
            if zlib.crc32(text) == self._head[3 + 2 * half]:
                return text
        return b""


class SharedMemory:
    """An anonymous file, mapped for the life of the process and inherited by its descriptor.

    It has no name that could be left behind, and is freed with the last process. (``multiprocessing.shared_memory``
    uses names, and until Python 3.13 a tracker that may unlink them too early.)

    Args:
        file: its descriptor, not closed here.
        workers: number of workers.

    Attributes:
        totals: a slot for each worker, and the supervisor's last.
        page_states: a slot for each worker.
        key_usage: a row for each worker.
    """

    def __init__(self, file: int, workers: int) -> None:
        self.file = file
        table = SharedTable.size(workers)
        memory = memoryview(mmap.mmap(file, self._size(workers)))
        self.table = SharedTable(memory, workers)
        rows = table + (2 * workers + 1) * SLOT_SIZE
        starts = range(table, rows, SLOT_SIZE)
        self.key_usage = [memory[rows + i * ROW_BYTES : rows + (i + 1) * ROW_BYTES] for i in range(workers)]
        slots = [SnapshotSlot(memory[start : start + SLOT_SIZE]) for start in starts]
        self.totals, self.page_states = slots[: workers + 1], slots[workers + 1 :]

    @staticmethod
    def _size(workers: int) -> int:
        return SharedTable.size(workers) + (2 * workers + 1) * SLOT_SIZE + workers * ROW_BYTES

    @classmethod
    def create(cls, workers: int) -> SharedMemory:
        """Allocate it."""
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("disagg-proxy")
        else:
            # Missing in Pythons that were built against an older C library.
            with tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as unnamed:
                file = os.dup(unnamed.fileno())
        os.ftruncate(file, cls._size(workers))
        return cls(file, workers)
