"""One command at a time changes what runs in a RUN_DIR.

The lock is the kernel's (flock), so a killed holder leaves nothing behind; ``RUN_DIR/lock`` says who holds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from disagg_machine import files, proc
from disagg_machine.messages import die
from disagg_machine.settings import Settings

SUPERVISOR = "supervisor"
"""The holder whose turns are so short that they are waited for."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the lock: a command, and its process."""

    pid: int
    command: str


def holder(run_dir: Path) -> Holder | None:
    """The command that holds the lock; None when nobody is known to."""
    fields = files.read_fields(run_dir / "lock")
    pid = fields.get("pid", "")
    if not pid.isdigit() or fields.get("boot") != proc.boot_id():
        return None
    stat = proc.read_stat(int(pid))
    if stat is None or stat.start != fields.get("start"):
        return None
    return Holder(int(pid), fields.get("command", "?"))


class Lock:
    """The lock of one RUN_DIR, held by this process or not."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "lock"
        self._descriptor: int | None = None

    def take(self, seconds: float, command: str) -> bool:
        """Wait that long for it; False when another command still holds it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    return False
                time.sleep(0.05)
        self._descriptor = descriptor
        stat = proc.read_stat(os.getpid())
        start = stat.start if stat else ""
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid={os.getpid()}\nstart={start}\nboot={proc.boot_id()}\ncommand={command}\n".encode())
        return True

    def release(self) -> None:
        """Give it back; nothing when it is not held."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None


def prepare_folders(settings: Settings) -> None:
    """Make RUN_DIR, private to the user, and LOG_DIR.

    Raises:
        MachineError: 1, a folder cannot be made or is not this user's.
    """
    for folder in (settings.run_dir, settings.log_dir):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            raise die(1, "cannot_make_dir", folder) from None
        if not os.access(folder, os.W_OK) or not files.is_own(folder):
            raise die(1, "dir_not_ours", folder)
    settings.run_dir.chmod(0o700)


@contextlib.contextmanager
def held(settings: Settings, command: str) -> Iterator[Lock]:
    """The lock for one command.

    Raises:
        MachineError: 1, another command is at work.
    """
    prepare_folders(settings)
    lock = Lock(settings.run_dir)
    _take(lock, settings.run_dir, command)
    try:
        yield lock
    finally:
        lock.release()


def _take(lock: Lock, run_dir: Path, command: str) -> None:
    if lock.take(0, command):
        return
    found = holder(run_dir)
    # Two starts at once: the second one says so at once.
    busy = command == "all" and found is not None and found.command != SUPERVISOR
    if busy or not lock.take(60, command):
        found = found if busy else holder(run_dir)
        raise die(1, "busy", found.command if found else "?", found.pid if found else "?")
