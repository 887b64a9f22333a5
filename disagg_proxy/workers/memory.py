"""The memory that the processes of one proxy have in common: the table, and an area for each of them.

An anonymous file, inherited by its descriptor: it has no name that could be left behind, and is gone with the last
process. (``multiprocessing.shared_memory`` has names, and until Python 3.13 a tracker that removes them too early.)
"""

from __future__ import annotations

import mmap
import os
import tempfile

from disagg_proxy.workers.area import SIZE, Area
from disagg_proxy.workers.table import Table


class Memory:
    """Mapped for as long as the process runs.

    Args:
        file: its descriptor, which stays the caller's.
        workers: how many there are.
    """

    def __init__(self, file: int, workers: int) -> None:
        self.file = file
        table = Table.size(workers)
        whole = memoryview(mmap.mmap(file, table + (workers + 1) * SIZE))
        self.table = Table(whole, workers)
        self.areas = [Area(whole[table + i * SIZE : table + (i + 1) * SIZE]) for i in range(workers + 1)]

    @classmethod
    def create(cls, workers: int) -> Memory:
        """A new one."""
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("disagg-proxy")
        else:
            # Pythons that were built against an older C library do not know it.
            with tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as unnamed:
                file = os.dup(unnamed.fileno())
        os.ftruncate(file, Table.size(workers) + (workers + 1) * SIZE)
        return cls(file, workers)
