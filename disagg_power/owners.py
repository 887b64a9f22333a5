"""The processes for whose sake clocks are set: when none of them is left, the lease ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Process:
    """One process; ``start`` is field 22 of /proc/PID/stat, without which a PID could be another one's."""

    pid: int
    start: str

    @property
    def runs(self) -> bool:
        """Whether it has neither ended nor become a zombie."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                line = file.read()
        except OSError:
            return False
        # The second field is the program's name in parentheses and may hold anything.
        fields = line[line.rfind(b")") + 2 :].split()
        return fields[19].decode() == self.start and fields[0] not in (b"Z", b"X")


def parse(text: str) -> Process:
    """``PID:START``. Raises ValueError."""
    pid, _, start = text.partition(":")
    return Process(int(pid), start)


def any_runs(owners: Sequence[Process]) -> bool:
    """Whether one of them runs; True without owners."""
    return not owners or any(owner.runs for owner in owners)
