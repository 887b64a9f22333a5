"""A process ends with its owner, however that ends, and so does what it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from disagg_machine import proc
from disagg_ray import claims
from disagg_ray.process import Ended, Process
from tests.ports import hold_port

FAMILY = """
import os, signal, sys, time
child = os.fork()
if child:
    print("child", child, flush=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else signal.SIG_DFL)
time.sleep(600)
"""
"""A process with a child, as an engine with its workers."""

OWNER = """
import os, sys, time
from pathlib import Path
from disagg_ray import claims
from disagg_ray.process import Process
claim = claims.claim(sys.argv[1], "127.0.0.1", "http", (int(sys.argv[2]), int(sys.argv[2])))
log = Path(sys.argv[1]) / "log"
process = Process("family", [sys.executable, "-c", sys.argv[3]], dict(os.environ), log, 0.5, [claim.fd])
claim.record(process.pid)
print(process._keeper.pid, process.pid, flush=True)
time.sleep(600)
"""


def until(true: object, what: str = "") -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 60
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def child_of(log: Path) -> int:
    until(lambda: log.exists() and "child" in log.read_text() and log.read_text().endswith("\n"))
    return int(log.read_text().split("child")[1].split()[0])


def gone(pid: int) -> bool:
    stat = proc.read_stat(pid)
    return stat is None or not stat.runs


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Process]:
    process = Process("family", [sys.executable, "-c", FAMILY], os.environ, tmp_path / "log", 30)
    yield process
    process.stop()


def test_stop_ends_all_of_it(family: Process) -> None:
    child = child_of(family.log)
    family.check()
    family.stop()
    until(lambda: gone(family.pid) and gone(child))
    family.stop()


def test_what_ignores_term_is_killed_after_the_grace(tmp_path: Path) -> None:
    process = Process("it", [sys.executable, "-c", FAMILY, "stubborn"], os.environ, tmp_path / "log", 0.3)
    child = child_of(process.log)
    process.stop()
    until(lambda: gone(process.pid) and gone(child))


def test_an_end_is_told_with_code_and_last_lines(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"]
    process = Process("prefill 10.0.0.2:20000", words, os.environ, tmp_path / "log", 1)
    process._keeper.wait(60)
    with pytest.raises(Ended, match=r"prefill 10.0.0.2:20000 ended with exit code 3, see .*: no such model"):
        process.check()


def test_a_signal_is_named(family: Process) -> None:
    child = child_of(family.log)
    os.kill(family.pid, signal.SIGKILL)
    family._keeper.wait(60)
    with pytest.raises(Ended, match="ended with signal 9"):
        family.check()
    until(lambda: gone(child), "the keeper ends what the command leaves behind")


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(Ended, match="cannot be started"):
        Process("it", ["/does/not/exist"], os.environ, tmp_path / "log", 1)


def test_a_killed_keeper_takes_the_process_along(family: Process) -> None:
    child = child_of(family.log)
    os.kill(family._keeper.pid, signal.SIGKILL)
    until(lambda: gone(family.pid), "the kernel kills it")
    family._keeper.wait(60)
    with pytest.raises(Ended, match="signal 9 to its keeper"):
        family.check()
    until(lambda: gone(child))


class Owner:
    """A replica's process, with an engine on a port of its own."""

    def __init__(self, run_dir: Path, port: int) -> None:
        words = [sys.executable, "-c", OWNER, str(run_dir), str(port), FAMILY]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.keeper, self.engine = map(int, self.process.stdout.readline().split())
        self.child = child_of(run_dir / "log")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    with ExitStack() as hold:
        found = Owner(tmp_path, hold_port(hold))
        yield found
        found.kill()
        for pid in (found.keeper, found.engine, found.child):
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


def test_kill_9_of_the_owner_leaves_nothing_behind(owner: Owner, tmp_path: Path) -> None:
    owner.kill()
    until(lambda: all(map(gone, (owner.keeper, owner.engine, owner.child))))
    assert claims.sweep(str(tmp_path), "127.0.0.1") == 1, "its claim is free"
    assert list((tmp_path / "claims").iterdir()) == []


def test_what_owner_and_keeper_left_is_swept_by_the_next_replica(owner: Owner, tmp_path: Path) -> None:
    assert claims.sweep(str(tmp_path), "127.0.0.1") == 0, "its owner lives"
    os.kill(owner.keeper, signal.SIGSTOP)
    owner.kill()
    os.kill(owner.keeper, signal.SIGKILL)
    until(lambda: gone(owner.engine))
    assert not gone(owner.child), "the kernel kills the engine only"
    claims.sweep(str(tmp_path), "127.0.0.1")
    until(lambda: gone(owner.child))
