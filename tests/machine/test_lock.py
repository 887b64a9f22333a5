"""One command at a time changes what runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from disagg_machine import lock, messages
from disagg_machine.lock import Holder, Lock
from disagg_machine.messages import MachineError
from tests.machine.conftest import MakeContext

HOLD = """
import sys
from pathlib import Path
from disagg_machine.lock import Lock
one = Lock(Path(sys.argv[1]))
assert one.take(0, sys.argv[2])
print("holds", flush=True)
sys.stdin.read()
"""


class Other:
    """Another process that holds the lock."""

    def __init__(self, run_dir: Path, command: str) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run_dir), command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == b"holds\n"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_held_and_given_back(make_context: MakeContext) -> None:
    context = make_context()
    with lock.held(context.settings, "all"):
        assert lock.holder(context.run_dir) == Holder(os.getpid(), "all")
        assert not Lock(context.run_dir).take(0, "stop")
    assert lock.holder(context.run_dir) is None and (context.run_dir / "lock").read_text() == ""
    assert context.run_dir.stat().st_mode & 0o777 == 0o700


def test_a_second_start_is_refused_at_once(make_context: MakeContext) -> None:
    context = make_context()
    other = Other(context.run_dir, "all")
    try:
        with pytest.raises(MachineError) as refused, lock.held(context.settings, "all"):
            pass
        messages.use("en")
        assert refused.value.code == 1 and f"`all` (PID {other.process.pid})" in str(refused.value)
    finally:
        other.end()


def test_a_killed_holder_leaves_nothing(make_context: MakeContext) -> None:
    context = make_context()
    other = Other(context.run_dir, "all")
    assert lock.holder(context.run_dir) == Holder(other.process.pid, "all")
    other.process.send_signal(signal.SIGKILL)
    other.end()
    assert lock.holder(context.run_dir) is None
    with lock.held(context.settings, "stop"):
        pass


def test_others_are_waited_for(make_context: MakeContext) -> None:
    context = make_context()
    other = Other(context.run_dir, lock.SUPERVISOR)
    one = Lock(context.run_dir)
    assert not one.take(0.1, "all")
    other.end()
    assert one.take(10, "all")
    one.release()
    one.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else(make_context: MakeContext) -> None:
    context = make_context()
    context.run_dir.mkdir()
    os.chown(context.run_dir, 65534, 65534)
    with pytest.raises(MachineError) as refused:
        lock.prepare_folders(context.settings)
    assert refused.value.key == "dir_not_ours"


def test_a_folder_that_cannot_be_made(make_context: MakeContext, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError) as refused:
        lock.prepare_folders(make_context(RUN_DIR=str(tmp_path / "file/run")).settings)
    assert refused.value.key == "cannot_make_dir"
