"""The processes for whose sake clocks are set: when none of them is left, the lease ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Process:
    """One process; ``start`` is field 22 of /proc/PID/stat, without which a PID could be another one's."""

    pid: int
    start: str

    @classmethod
    def current(cls) -> Process:
        """This process."""
        pid = os.getpid()
        return cls(pid, _read_stat(pid)[19].decode())

    @property
    def runs(self) -> bool:
        """Whether it has neither ended nor become a zombie."""
        try:
            fields = _read_stat(self.pid)
        except OSError:
            return False
        return fields[19].decode() == self.start and fields[0] not in (b"Z", b"X")


def _read_stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third one on. Raises OSError."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        line = file.read()
    # The second field is the program's name in parentheses and may hold anything.
    return line[line.rfind(b")") + 2 :].split()


def parse(text: str) -> Process:
    """``PID:START``. Raises ValueError."""
    pid, _, start = text.partition(":")
    return Process(int(pid), start)


def any_runs(owners: Sequence[Process]) -> bool:
    """Whether one of them runs; True without owners."""
    return not owners or any(owner.runs for owner in owners)
