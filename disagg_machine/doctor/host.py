"""Limits of this host that `doctor` looks at: memory, open files, shared memory."""

from __future__ import annotations

import os
import re
import resource

SHM = "/dev/shm"


def available_gib(meminfo: str = "/proc/meminfo") -> int:
    """Memory that programs can still get, in GiB; 0 when the kernel does not say."""
    try:
        with open(meminfo, encoding="ascii", errors="replace") as file:
            found = re.search(r"^MemAvailable:\s*([0-9]+)", file.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) >> 20 if found else 0


def open_files() -> int | None:
    """Files and sockets that one process may have open; None when that is not limited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def shm_mib(folder: str = SHM) -> int:
    """Free MiB in /dev/shm, which the ranks of one engine share; 0 when there is none."""
    try:
        usage = os.statvfs(folder)
    except OSError:
        return 0
    return usage.f_bavail * usage.f_frsize >> 20
