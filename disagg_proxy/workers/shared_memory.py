"""The memory that the processes of one proxy have in common: the table, an area for each of them, and for each worker
one more, for what only the page shows (telemetry/page_state.py).

An anonymous file, inherited by its descriptor: it has no name that could be left behind, and is gone with the last
process. (``multiprocessing.shared_memory`` has names, and until Python 3.13 a tracker that removes them too early.)
"""

from __future__ import annotations

import mmap
import os
import tempfile

from disagg_proxy.workers.shared_table import SharedTable
from disagg_proxy.workers.snapshot_slot import SIZE, SnapshotSlot


class SharedMemory:
    """Mapped for as long as the process runs.

    Args:
        file: its descriptor, which stays the caller's.
        workers: how many there are.
    """

    def __init__(self, file: int, workers: int) -> None:
        self.file = file
        table = SharedTable.size(workers)
        whole = memoryview(mmap.mmap(file, self._size(workers)))
        self.table = SharedTable(whole, workers)
        areas = [SnapshotSlot(whole[table + i * SIZE : table + (i + 1) * SIZE]) for i in range(2 * workers + 1)]
        self.areas, self.news = areas[: workers + 1], areas[workers + 1 :]

    @staticmethod
    def _size(workers: int) -> int:
        return SharedTable.size(workers) + (2 * workers + 1) * SIZE

    @classmethod
    def create(cls, workers: int) -> SharedMemory:
        """A new one."""
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("disagg-proxy")
        else:
            # Pythons that were built against an older C library do not know it.
            with tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as unnamed:
                file = os.dup(unnamed.fileno())
        os.ftruncate(file, cls._size(workers))
        return cls(file, workers)
