"""The holder of a lease: what it asks the guard for, and the status that it writes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from disagg_power import status_file
from disagg_power.lease import Lease, LeaseError
from disagg_power.status_file import DEFAULT, FAILED, SET, Status


@dataclass(frozen=True, slots=True)
class RoleSetting:
    """What the GPUs of one role get; empty texts leave a setting as it is."""

    gpus: tuple[str, ...]
    sm: str = ""
    memory: str = ""
    power: str = ""

    @property
    def sets(self) -> bool:
        """Whether anything is to be set."""
        return bool(self.sm or self.memory or self.power)


class Holder:
    """Holds the lease of one guard.

    Args:
        start: starts the guard.
        path: of the status file.
        wall: Unix time.
    """

    def __init__(
        self,
        roles: Mapping[str, RoleSetting],
        start: Callable[[], Lease],
        path: Path,
        say: Callable[[str], None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._roles = roles
        self._start = start
        self._path = path
        self._say = say
        self._wall = wall
        self.lease: Lease | None = None
        self.status = Status(os.getpid(), DEFAULT)

    def begin(self) -> bool:
        """Start the guard and set every role; False, and the status says why, when that is not possible."""
        try:
            self.lease = self._start()
            clocks, notes = self._set_all(self.lease)
        except LeaseError as error:
            self.note(Status(os.getpid(), FAILED, str(error), error.kind))
            self._say(str(error))
            return False
        for note in notes:
            self._say(note)
        self.note(replace(self.status, state=SET, clocks_mhz=clocks, notes=tuple(notes)))
        return True

    def _set_all(self, lease: Lease) -> tuple[dict[str, int | None], list[str]]:
        clocks: dict[str, int | None] = {}
        notes: list[str] = []
        for role, setting in self._roles.items():
            for gpu in setting.gpus if setting.sets else ():
                applied = lease.set(gpu, sm=setting.sm, memory=setting.memory, power=setting.power)
                clocks[role] = applied["sm"]
                notes += [f"GPU {applied['gpu']}: {note}" for note in applied["notes"]]
                self._say(f"GPU {applied['gpu']} ({role}): {described(setting, applied)}")
        return clocks, notes

    def note(self, status: Status) -> None:
        """Write the status."""
        self.status = replace(status, since=self._wall())
        status_file.write(self._path, self.status)

    def end(self, why: str) -> int:
        """End the lease; the exit code is 1 when something could not be reset."""
        gone = self.lease is not None and not self.lease.alive
        code = self.lease.close() if self.lease else 0
        self._say(f"the lease ends: {why}")
        if gone:
            self.note(replace(self.status, state=DEFAULT, why=why, kind="gone", clocks_mhz={}))
        else:
            self._path.unlink(missing_ok=True)
        return code


def described(setting: RoleSetting, applied: Mapping[str, object]) -> str:
    """What was set, in words."""
    parts = []
    for text, name, unit in ((setting.sm, "sm", "SM clock"), (setting.memory, "memory", "memory clock")):
        if text:
            parts.append(f"{unit} {'pinned to' if 'lock' in text.lower() else 'at most'} {applied[name]} MHz")
    if setting.power:
        parts.append(f"power limit {applied['power_w']:g} W")
    return ", ".join(parts)
