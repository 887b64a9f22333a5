"""Processes as /proc shows them. A PID alone names nobody: with its start time and the boot it is one process.

psutil would say the same, but `stop` and `status` must work without any package (docs/dependencies.md).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Stat:
    """One process: its state (a letter, see proc(5)), process group, session, and start in clock ticks since boot."""

    state: str
    group: int
    session: int
    start: str

    @property
    def runs(self) -> bool:
        """Whether it is neither a zombie nor dead."""
        return self.state not in ("Z", "X")


def read_stat(pid: int) -> Stat | None:
    """The process ``pid``; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read()
    except OSError:
        return None
    # The second field is the program's name in parentheses and may hold anything.
    fields = line[line.rfind(b")") + 2 :].split()
    if len(fields) < 20:
        return None
    return Stat(fields[0].decode(), int(fields[2]), int(fields[3]), fields[19].decode())


def runs(pid: int, start: str) -> bool:
    """Whether the process that was ``pid`` with this start time still runs."""
    stat = read_stat(pid)
    return stat is not None and stat.start == start and stat.runs


@lru_cache(maxsize=1)
def boot_id() -> str:
    """This boot of the machine; start times of another one mean nothing."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


def pids() -> list[int]:
    """All processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def group_members(group: int) -> list[int]:
    """PIDs of a process group that leads a session and still run. A group outlives its leader."""
    found = []
    for pid in pids():
        stat = read_stat(pid)
        if stat is not None and stat.group == stat.session == group and stat.runs:
            found.append(pid)
    return found


def command_line(pid: int, limit: int = 120) -> str:
    """The words of a process, cut off after ``limit`` characters; empty when it is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096)
    except OSError:
        return ""
    return words.rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")[:limit]


def descriptors(pid: int) -> set[str]:
    """What the descriptors of a process are, such as ``socket:[4711]``; empty for processes of other users."""
    folder = f"/proc/{pid}/fd"
    found: set[str] = set()
    try:
        numbers = os.listdir(folder)
    except OSError:
        return found
    for number in numbers:
        # One that was closed in the meantime says nothing of the others.
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"{folder}/{number}"))
    return found
