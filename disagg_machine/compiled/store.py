"""The folder of builds, private to the user: ``$XDG_CACHE_HOME/disagg-proxy/compiled``, ``~/.cache`` by default.

    lock                    held by the one build at a time, and by the programs that it has started
    tools-ID/               the compiler's environment, for one Python
    CHECKOUT/               one for each checkout
        checkout            its path
        DIGEST/             a build: the sources that it was made from with the native modules beside them
        DIGEST.attempt      the build that is running, or has failed

A build that is there is complete: it gets its name when nothing is missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from disagg_machine import files, proc
from disagg_machine.compiled.identity import short

IN_USE = 3600
"""Seconds after its last start for which a build is kept, so that nothing is removed under a proxy that starts."""

TOOLS_KEPT = 30 * 86400
"""Seconds after its last use for which a compiler's environment is kept."""

RUNNING, FAILED = "running", "failed"


def folder(environ: Mapping[str, str], run_dir: Path) -> Path:
    """Where builds are kept; in RUN_DIR for a user without a home."""
    cache = environ.get("XDG_CACHE_HOME", "")
    if not cache.startswith("/"):
        home = environ.get("HOME", "")
        cache = f"{home}/.cache" if home.startswith("/") else str(run_dir)
    return Path(cache) / "disagg-proxy" / "compiled"


@dataclass(frozen=True, slots=True)
class Attempt:
    """A build that has not succeeded: it runs, or has failed, or was killed; ``log`` tells."""

    log: str
    runs: bool


class Store:
    """The builds of one checkout."""

    def __init__(self, root: Path, checkout: Path) -> None:
        self.root = root
        self.checkout = checkout
        self.folder = root / short(str(checkout.resolve()))

    def find(self, digest: str) -> Path | None:
        """The build of this name, which is kept from now on; None when there is none, or it is not this user's."""
        path = self.folder / digest
        if not (files.is_own(self.root) and files.is_own(path)):
            return None
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def attempt(self, digest: str) -> Attempt | None:
        """What became of the last build of this name; None when it may be built."""
        fields = files.read_fields(self._attempt(digest))
        log, pid = fields.get("log", ""), fields.get("pid", "")
        if fields.get("state") == FAILED:
            return Attempt(log, runs=False)
        if fields.get("state") != RUNNING or not pid.isdigit() or fields.get("boot") != proc.boot_id():
            return None
        return Attempt(log, runs=proc.runs(int(pid), fields.get("start", "")))

    def note(self, digest: str, state: str, log: Path) -> None:
        """Remember the build that this process tries. One that is killed stays as it is, and counts as failed."""
        stat = proc.read_stat(os.getpid())
        known = {"state": state, "log": log, "pid": os.getpid(), "start": stat.start if stat else ""}
        files.write_fields(self._attempt(digest), {**known, "boot": proc.boot_id()})

    def forget(self, digest: str) -> None:
        """The build of this name may be tried again."""
        self._attempt(digest).unlink(missing_ok=True)

    def _attempt(self, digest: str) -> Path:
        return self.folder / f"{digest}.attempt"

    def prepare(self) -> None:
        """Make the folders. What an earlier build of this checkout left half made is removed: call with the lock."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root.chmod(0o700)
        (self.folder / "checkout").write_text(f"{self.checkout}\n", encoding="utf-8", errors="surrogateescape")
        for path in self.folder.glob("new-*"):
            shutil.rmtree(path, ignore_errors=True)

    def clean(self, digest: str, now: float) -> None:
        """Remove what nobody uses any more, but not the build of this name. ``now``: seconds since 1970."""
        used = mapped_files()
        for path in self.folder.iterdir():
            if path.name.partition(".")[0] in (digest, "checkout"):
                continue
            if path.is_dir():
                if now - path.stat().st_mtime > IN_USE and not any(f"{path}/" in name for name in used):
                    shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for other in self.root.iterdir():
            if other.name.startswith("tools-"):
                if now - other.stat().st_mtime > TOOLS_KEPT:
                    shutil.rmtree(other, ignore_errors=True)
            elif other.is_dir() and not _is_there(other) and not any(f"{other}/" in name for name in used):
                shutil.rmtree(other, ignore_errors=True)


def _is_there(builds: Path) -> bool:
    """Whether the checkout of these builds still exists."""
    try:
        path = (builds / "checkout").read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n")
    except OSError:
        return True
    return os.path.isdir(path)


def mapped_files(pids: Iterable[int] | None = None) -> set[str]:
    """Native code that this user's processes have loaded (``/proc/PID/maps``)."""
    found: set[str] = set()
    for pid in proc.pids() if pids is None else pids:
        try:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
                found.update(line.split(None, 5)[5].rstrip("\n") for line in maps if ".so" in line)
        except (OSError, IndexError):
            continue
    return found
