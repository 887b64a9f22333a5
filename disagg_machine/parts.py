"""What runs: PID files, process groups, start and stop. Nothing is looked up by name.

``RUN_DIR/NAME.pid`` holds ``name=value`` lines: pid, start, boot, log, since, kind, role, mode, http, kv, gpus, served,
connector; of the proxy also python and server, of a build of its hot path digest. ``pid=0`` stands for a part that is
wanted and does not run: the supervisor will start it.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from disagg_machine import files, proc, signals, ui

ALIVE, DEAD, REUSED = "alive", "dead", "reused"
"""States of a part: its process runs; it is gone, or a zombie; its PID belongs to another process now."""

KINDS = ("proxy", "prefill", "decode", "plain", "power", "supervisor")
"""Names of parts, in the order in which they are shown; several of a role are numbered."""

HELPERS = ("power", "supervisor")
"""Parts that serve no requests: the holder of the clocks, and what restarts the others."""


@dataclass(frozen=True, slots=True)
class Part:
    """One PID file.

    Attributes:
        pid: 0 when the file names none.
        state: :data:`ALIVE`, :data:`DEAD` or :data:`REUSED`.
        fields: all that the file holds.
    """

    name: str
    pid: int
    state: str
    fields: Mapping[str, str] = field(default_factory=dict)

    def get(self, key: str, default: str = "") -> str:
        """A field of the file."""
        return self.fields.get(key, default)

    def number(self, key: str, default: int = 0) -> int:
        """A field that is a number."""
        value = self.fields.get(key, "")
        return int(value) if value.isascii() and value.isdigit() else default

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.state == ALIVE

    @property
    def foreground(self) -> bool:
        """Whether it runs in a terminal of its own."""
        return self.get("mode") == "foreground"

    @property
    def own_connector(self) -> bool:
        """Whether it is an engine with this project's KV connector."""
        return self.get("connector") == "own"

    @property
    def may_be_signalled(self) -> bool:
        """Whether the process group is still that of the part: not when the PID was reused, or after a reboot."""
        return self.pid > 0 and self.state != REUSED and self.get("boot") == proc.boot_id()


def load_part(run_dir: Path, name: str) -> Part | None:
    """The part whose PID file is there and is this user's; None when there is none."""
    path = run_dir / f"{name}.pid"
    if not files.is_own(path):
        return None
    fields = files.read_fields(path)
    text = fields.get("pid", "")
    pid = int(text) if re.fullmatch(r"[1-9][0-9]{0,9}", text, re.ASCII) else 0
    state = DEAD
    if pid and fields.get("boot") == proc.boot_id():
        stat = proc.read_stat(pid)
        if stat is not None and stat.start != fields.get("start"):
            state = REUSED
        elif stat is not None and stat.runs:
            state = ALIVE
    return Part(name, pid, state, fields)


def alive_part(run_dir: Path, name: str) -> Part | None:
    """The part when its process runs, else None."""
    part = load_part(run_dir, name)
    return part if part is not None and part.alive else None


_NAME = re.compile(r"([a-z]+)([0-9]{0,2})\.pid", re.ASCII)


def known_parts(run_dir: Path) -> list[str]:
    """Names of all PID files: the proxy first, engines after it, the supervisor last."""
    try:
        matches = [_NAME.fullmatch(name) for name in os.listdir(run_dir)]
    except OSError:
        return []
    found = [(KINDS.index(match[1]), match[2]) for match in matches if match and match[1] in KINDS]
    return [f"{KINDS[kind]}{number}" for kind, number in sorted(found, key=lambda one: (one[0], len(one[1]), one[1]))]


def all_parts(run_dir: Path) -> list[Part]:
    """Every part that has a PID file, in the order of :func:`known_parts`."""
    found = (load_part(run_dir, name) for name in known_parts(run_dir))
    return [part for part in found if part is not None]


def anything_alive(run_dir: Path) -> bool:
    """Whether a process of this RUN_DIR runs."""
    return any(part.alive for part in all_parts(run_dir))


# -- start


def spawn(
    words: Sequence[str],
    environment: Mapping[str, str],
    pid_file: Path,
    fields: Mapping[str, object],
    *,
    folder: Path,
    log: Path | None,
) -> int:
    """Start a program in a session of its own, and return its PID.

    Ctrl+C here does not reach it, and its children can be signalled with it. It ignores SIGHUP unless it handles it, as
    the proxy does once it serves. The child writes its own PID file before
    it becomes the program, so that it is known from its first moment on, even if this process is killed.

    Args:
        log: where its output is added; None keeps the output of this process.
    """
    ready, started = os.pipe()
    with signals.held_back():
        pid = os.fork()
        if pid == 0:
            try:
                _become(words, environment, pid_file, fields, folder, log)
            except BaseException as error:
                os.write(2, f"{words[0]}: {error}\n".encode())
            finally:
                os._exit(127)
        os.close(started)
        # Closed when the child has become the program: its group and its PID file are there.
        os.read(ready, 1)
    os.close(ready)
    return pid


def _become(
    words: Sequence[str],
    environment: Mapping[str, str],
    pid_file: Path,
    fields: Mapping[str, object],
    folder: Path,
    log: Path | None,
) -> NoReturn:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.chdir(folder)
    stat = proc.read_stat(os.getpid())
    known: dict[str, object] = {
        "pid": os.getpid(),
        "start": stat.start if stat else "",
        "boot": proc.boot_id(),
        "log": log or "-",
        "since": int(time.time()),
        **fields,
    }
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if log is not None:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
    files.write_fields(pid_file, known)
    os.execvpe(words[0], list(words), dict(environment))


def reap(children: Iterable[int]) -> set[int]:
    """Those children of this process that have not ended; the others leave no zombie."""
    left = set()
    for pid in children:
        try:
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                left.add(pid)
        except ChildProcessError:
            continue
    return left


# -- stop


def signal_group(number: int, group: int) -> None:
    """A signal to a process group; to the process alone while it has no group."""
    for send in (os.killpg, os.kill):
        try:
            send(group, number)
            return
        except OSError:
            continue


def stop_parts(
    run_dir: Path, seconds: float, names: Iterable[str], sleep: Callable[[float], None] = time.sleep
) -> None:
    """TERM to all of these parts at once, KILL for what is left after ``seconds``; removes the PID files."""
    names = list(names)
    groups: dict[str, int] = {}
    for name in names:
        part = load_part(run_dir, name)
        if part is not None and part.may_be_signalled and proc.group_members(part.pid):
            groups[name] = part.pid
            signal_group(signal.SIGTERM, part.pid)
    left = _wait_for_groups(groups, seconds, sleep)
    for name, group in left.items():
        ui.warn("killing", name, group, f"{seconds:g}")
        signal_group(signal.SIGKILL, group)
    _wait_for_groups(left, 10, sleep)
    for name in names:
        (run_dir / f"{name}.pid").unlink(missing_ok=True)


def _wait_for_groups(groups: Mapping[str, int], seconds: float, sleep: Callable[[float], None]) -> dict[str, int]:
    deadline = time.monotonic() + seconds
    left = dict(groups)
    while left:
        left = {name: group for name, group in left.items() if proc.group_members(group)}
        if not left or time.monotonic() >= deadline:
            break
        sleep(0.05)
    return left


def sweep(run_dir: Path, name: str) -> None:
    """What a dead part left: its children, then its file."""
    part = load_part(run_dir, name)
    if part is not None and not part.alive:
        stop_parts(run_dir, 5, [name])
