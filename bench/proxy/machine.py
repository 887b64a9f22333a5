"""The machine: tools, cores, description; processes pinned to a core, and their accounting by the kernel."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

_OPEN_FILES = 16384
"""For 5,000 streams, each with two connections in the engine or the proxy."""


class Unable(Exception):
    """The benchmark cannot run here, and why."""


@dataclass(frozen=True)
class Cores:
    """Where the measured proxy runs, and where load and engines do."""

    proxy: int
    load: int


def check(cores: Cores) -> None:
    """
    Raises:
        Unable: a tool or a core is missing.
    """
    for tool, where in (("gcc", "package gcc"), ("taskset", "package util-linux")):
        if shutil.which(tool) is None:
            raise Unable(f"{tool} is not installed ({where})")
    allowed = os.sched_getaffinity(0)
    if cores.proxy == cores.load or not {cores.proxy, cores.load} <= allowed:
        raise Unable(f"two cores are needed, {cores.proxy} and {cores.load}; this process may use {sorted(allowed)}")


def allow_files() -> None:
    """Raise the limit of open files of this process and of those it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _OPEN_FILES)), hard))


def build(name: str, to: Path) -> Path:
    """The program of ``name``.c, recompiled when its source or a header has changed.

    Raises:
        Unable: it does not compile.
    """
    source = b"".join(path.read_bytes() for path in sorted((HERE / f"{name}.c", *HERE.glob("*.h"))))
    program = to / f"{name}-{hashlib.sha256(source).hexdigest()[:12]}"
    if not program.exists():
        to.mkdir(parents=True, exist_ok=True)
        partial = program.with_suffix(f".{os.getpid()}")
        command = ["gcc", "-O2", "-o", str(partial), str(HERE / f"{name}.c")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unable(f"{name}.c does not compile: {done.stderr.strip()}")
        partial.rename(program)
    return program


def free_port() -> int:
    """A TCP port of the loopback that nothing uses now; for programs that cannot tell which they got."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_on_sigterm() -> None:
    """Let SIGTERM unwind as Ctrl-C does, so that what was started is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def running(
    command: Sequence[str], core: int, *, log: int | IO[Any], environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A program pinned to a core, in a separate process group that is killed at the end."""
    process = subprocess.Popen(
        ["taskset", "-c", str(core), *command],
        stdout=log,
        stderr=subprocess.STDOUT if log != subprocess.PIPE else None,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    for signal_number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    _kill_group(process.pid)
    if process.stdout:
        process.stdout.close()


def _kill_group(group: int) -> None:
    """Kill what is left of a process group, and return when it has ended: SIGKILL itself does not wait."""
    with contextlib.ExitStack() as ends:
        living = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # Fields after the name, which may contain anything: state, parent, process group.
                if int(status.read_text().rpartition(")")[2].split()[2]) == group:
                    living.append(os.pidfd_open(int(status.parent.name)))
                    ends.callback(os.close, living[-1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        for process in living:
            select.select([process], [], [], 10)


def tree(pid: int) -> list[int]:
    """The process and all it started, as far as they live."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += tree(int(child))
    return found


def rss_kb(pids: Sequence[int]) -> int:
    """Resident memory, KiB, summed."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            total += int(match[1]) if match else 0
    return total


def _busy(cores: Cores) -> tuple[float, float]:
    """Seconds each core has worked since the machine's start."""
    text = Path("/proc/stat").read_text()
    tick = os.sysconf("SC_CLK_TCK")
    found = []
    for core in (cores.proxy, cores.load):
        fields = re.search(rf"^cpu{core} (.*)$", text, re.M)
        times = [int(field) for field in fields[1].split()] if fields else [0] * 8
        found.append((times[0] + times[1] + times[2] + times[5] + times[6]) / tick)
    return found[0], found[1]


def wait_quiet(cores: Cores, patience: float) -> bool:
    """Wait until others leave both cores alone for half a second; False when they do not within ``patience`` s."""
    end = time.monotonic() + patience
    pause = 0.5
    while True:
        before = _busy(cores)
        time.sleep(pause)
        after = _busy(cores)
        if after[0] - before[0] <= 0.15 * pause and after[1] - before[1] <= 0.3 * pause:
            return True
        if time.monotonic() > end:
            return False


def describe(cores: Cores) -> dict[str, Any]:
    """What a reader needs to know of the machine."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    gcc = subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "proxy_core": cores.proxy,
        "load_core": cores.load,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gcc": gcc,
    }
