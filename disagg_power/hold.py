"""``disagg-proxy power hold``: asks the guard for each role's clocks and keeps the lease while the owners run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from disagg_power import owners, state_file, status_file
from disagg_power.backends import NAMES
from disagg_power.clock_values import parse_clock, parse_watts
from disagg_power.lease import Lease, LeaseError, guard_words
from disagg_power.owners import Process
from disagg_power.status_file import DEFAULT, FAILED, SET, Status

BEAT = 0.5
"""Seconds between two signs of life to the guard."""
ROLES = ("prefill", "decode")


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
        code = self.lease.close() if self.lease else 0
        self._say(f"the lease ends: {why}")
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


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``hold``."""
    hold = commands.add_parser(
        "hold",
        help="set each role's clocks for as long as this process and its owners run",
        description="Starts the guard and keeps its lease. `machine all` runs it; see docs/clocks.md.",
    )
    hold.add_argument("--run-dir", type=Path, default=Path(os.environ.get("RUN_DIR") or "run"), metavar="FOLDER",
                      help="of the files power.state and power.status")  # fmt: skip
    hold.add_argument("--backend", choices=NAMES, default="auto", help="what sets clocks")
    hold.add_argument("--take-over", action="store_true", help="also GPUs whose clocks somebody else has set")
    hold.add_argument("--owner", type=owners.parse, action="append", default=[], metavar="PID:START",
                      help="a process for which clocks are set; when none of them runs, this one ends")  # fmt: skip
    for role in ROLES:
        hold.add_argument(f"--{role}-gpus", default="", metavar="GPUS", help=f"of {role}, such as 0,1")
        hold.add_argument(f"--{role}-sm", default="", metavar="MHZ", help=f"SM clock of {role}: a cap, or lock:MHZ")
        hold.add_argument(f"--{role}-memory", default="", metavar="MHZ", help=f"memory clock of {role}, likewise")
        hold.add_argument(f"--{role}-power", default="", metavar="WATTS", help=f"power limit of {role}'s GPUs")
    hold.set_defaults(run=run_hold)


def role_settings(args: argparse.Namespace) -> dict[str, RoleSetting]:
    """By role.

    Raises:
        BadValue: a clock or power limit that is none.
    """
    found = {}
    for role in ROLES:
        gpus, sm, memory, power = (getattr(args, f"{role}_{name}") for name in ("gpus", "sm", "memory", "power"))
        parse_clock(sm), parse_clock(memory), parse_watts(power)
        found[role] = RoleSetting(tuple(filter(None, gpus.split(","))), sm, memory, power)
    return found


def run_hold(args: argparse.Namespace) -> int:
    """The process."""
    try:
        roles = role_settings(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    gpus = [gpu for setting in roles.values() for gpu in setting.gpus]
    words = guard_words(args.run_dir / state_file.NAME, gpus, args.backend, take_over=args.take_over)
    holder = Holder(roles, lambda: Lease(words), args.run_dir / status_file.NAME, say)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    if not holder.begin():
        if holder.lease is not None:
            holder.lease.close()
        return 1
    return holder.end(keep(holder, args.owner, ended))


def keep(holder: Holder, owned_by: Sequence[Process], ended: threading.Event) -> str:
    """Signs of life to the guard until the end, and why it came."""
    while not ended.wait(BEAT):
        if not owners.any_runs(owned_by):
            return "the processes for which clocks were set have ended"
        try:
            assert holder.lease is not None
            holder.lease.beat()
        except LeaseError as error:
            return str(error)
    return "stopped"


def say(line: str) -> None:
    """One line for the log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} power: {line}", flush=True)
