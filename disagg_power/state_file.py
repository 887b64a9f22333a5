"""What the guard has changed, on disk before it is changed, so that anybody can undo it after a crash.

One file for each RUN_DIR, and one claim for each GPU of the machine: a file with a kernel lock (flock), which ends with
the process that holds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from disagg_power.gpus import SIMULATED

FORMAT = 1
NAME = "power.state"
"""The file in RUN_DIR."""


@dataclass(frozen=True, slots=True)
class Changed:
    """One GPU whose settings were changed, or were about to be.

    Attributes:
        power_before_w: the power limit to go back to; None where it was not changed.
    """

    uuid: str
    index: int
    sm: bool = False
    memory: bool = False
    power_before_w: float | None = None


@dataclass(frozen=True, slots=True)
class State:
    """All that a guard has changed.

    Attributes:
        boot: the boot in which it did; locks do not survive another one.
        backend: what it was changed with.
        pid, start: of the guard; ``start`` as in :class:`disagg_power.owners.Process`.
        python: its Python, which can read the GPUs.
    """

    boot: str
    backend: str
    pid: int
    gpus: tuple[Changed, ...]
    python: str = ""
    start: str = ""


class BadState(Exception):
    """The file cannot be understood; the text names it."""


def boot_id() -> str:
    """This boot of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def write(path: Path, state: State) -> None:
    """Replace the file at once and force it to disk; without GPUs it is removed."""
    if not state.gpus:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with open(new, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump({"format": FORMAT, **asdict(state)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def read(path: Path) -> State | None:
    """What is to be undone; None where there is no file.

    Raises:
        BadState: it cannot be understood.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("format") != FORMAT:
            raise BadState(f"{path}: its format is not {FORMAT}")
        return State(**{**value, "gpus": tuple(Changed(**one) for one in value["gpus"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadState(f"{path}: {error}") from None


# -- claims


def claims_folder(environ: Mapping[str, str]) -> Path:
    """Where the claims of all users of this machine are: /var/lock is writable by everybody on Debian and Fedora.

    Simulated GPUs are those of one file, and so are the claims to them.
    """
    if simulated := environ.get(SIMULATED):
        return Path(simulated).resolve().parent
    folder = Path("/var/lock")
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


class Claimed(Exception):
    """Another process sets this GPU; the text names it."""


class Claims:
    """The GPUs that this process alone may set."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, int] = {}

    def take(self, uuid: str) -> None:
        """Claim a GPU; nothing when it is held already.

        Raises:
            Claimed: by another process.
            OSError: the folder cannot be written.
        """
        if uuid in self._held:
            return
        path = self._folder / f"disagg-power-{uuid}.lock"
        # The folder is everybody's, so a link may not be followed.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip() or "?"
            os.close(descriptor)
            raise Claimed(f"process {holder} sets it") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._held[uuid] = descriptor

    def release(self, uuid: str | None = None) -> None:
        """Give one back, or all of them."""
        for one in list(self._held) if uuid is None else [uuid]:
            descriptor = self._held.pop(one)
            os.ftruncate(descriptor, 0)
            os.close(descriptor)


@contextlib.contextmanager
def claimed(folder: Path, uuids: Sequence[str]) -> Iterator[None]:
    """Within, these GPUs are this process's. Raises Claimed."""
    claims = Claims(folder)
    try:
        for uuid in uuids:
            claims.take(uuid)
        yield
    finally:
        claims.release()
