"""PID files, process groups, start and stop, with processes of the test's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg_machine import messages, parts, proc
from disagg_machine.parts import ALIVE, DEAD, REUSED, load_part


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    one = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield one
    one.kill()
    one.wait()


def write(folder: Path, name: str, **fields: object) -> None:
    (folder / f"{name}.pid").write_text("".join(f"{key}={value}\n" for key, value in fields.items()))


def identity(pid: int) -> dict[str, object]:
    stat = proc.read_stat(pid)
    assert stat is not None
    return {"pid": pid, "start": stat.start, "boot": proc.boot_id()}


def test_states(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    known = identity(process.pid)
    assert load_part(tmp_path, "decode") is None
    for change, state in (
        ({}, ALIVE),
        ({"start": "1"}, REUSED),
        ({"boot": "a-former-life"}, DEAD),
        ({"pid": "0"}, DEAD),
        ({"pid": "-5"}, DEAD),
        ({"pid": "1e3"}, DEAD),
    ):
        write(tmp_path, "decode", **{**known, **change}, role="decode", connector="own")
        part = load_part(tmp_path, "decode")
        assert part is not None and part.state == state, change
        assert part.may_be_signalled is (change == {}), "nobody else's process is ever signalled"
    process.kill()
    process.wait()
    write(tmp_path, "decode", **known)
    part = load_part(tmp_path, "decode")
    assert part is not None and part.state == DEAD and part.may_be_signalled, "its children may still run"


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    known = identity(process.pid)
    while (stat := proc.read_stat(process.pid)) is not None and stat.runs:
        time.sleep(0.01)
    write(tmp_path, "proxy", **known)
    part = load_part(tmp_path, "proxy")
    process.wait()
    assert part is not None and part.state == DEAD


def test_fields(tmp_path: Path) -> None:
    write(tmp_path, "prefill", pid=7, since=12, served="many", mode="foreground", connector="own")
    part = load_part(tmp_path, "prefill")
    assert part is not None and part.foreground and part.own_connector
    assert (part.number("since"), part.number("served", 3), part.get("nothing", "x")) == (12, 3, "x")


def test_order_of_names(tmp_path: Path) -> None:
    names = ["supervisor", "decode10", "decode2", "prefill", "proxy", "plain1"]
    for name in [*names, "other", "decode100", "prefill1x"]:
        write(tmp_path, name, pid=0)
    assert parts.known_parts(tmp_path) == ["proxy", "prefill", "decode2", "decode10", "plain1", "supervisor"]
    assert parts.known_parts(tmp_path / "nowhere") == [] and not parts.anything_alive(tmp_path)


def test_what_is_spawned_is_known_from_its_first_moment(tmp_path: Path) -> None:
    """In a session of its own, with default signals but SIGHUP, in its folder, its output added to the log."""
    log = tmp_path / "log"
    log.write_text("before\n")
    report = (
        "import os, signal, sys; print(os.getcwd(), os.environ['NAME'], os.getsid(0) == os.getpid(), "
        "signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "
        "signal.pthread_sigmask(signal.SIG_BLOCK, ()), "
        "open(sys.argv[1]).read().split()[0], flush=True); signal.pause()"
    )
    pid_file = tmp_path / "proxy.pid"
    pid = parts.spawn(
        [sys.executable, "-S", "-c", report, str(pid_file)],
        {**os.environ, "NAME": "value"},
        pid_file,
        {"role": "proxy", "mode": "background"},
        folder=tmp_path,
        log=log,
    )
    try:
        part = load_part(tmp_path, "proxy")
        assert part is not None and part.alive and part.pid == pid and part.get("log") == str(log)
        assert abs(part.number("since") - time.time()) < 60 and part.get("role") == "proxy"
        assert pid_file.stat().st_mode & 0o777 == 0o600
        while len(log.read_text().splitlines()) < 2:
            time.sleep(0.01)
        assert log.read_text() == f"before\n{tmp_path} value True True True set() pid={pid}\n"
    finally:
        parts.stop_parts(tmp_path, 5, ["proxy"])
    assert os.waitpid(pid, 0)[1] == signal.SIGTERM and not pid_file.exists()


def test_a_program_that_is_not_there_says_so_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pid = parts.spawn(["/nowhere/python"], {}, tmp_path / "proxy.pid", {}, folder=tmp_path, log=log)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 127
    assert "/nowhere/python: " in log.read_text()


def test_children_that_outlive_their_part_are_stopped(tmp_path: Path) -> None:
    """As vLLM's engine core when its API server is killed: the group is stopped although its leader is gone."""
    leader = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; wait"], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    leader.stdout.close()
    write(tmp_path, "decode", **identity(leader.pid))
    leader.kill()
    leader.wait()
    assert proc.group_members(leader.pid) == [child]
    parts.sweep(tmp_path, "decode")
    assert proc.group_members(leader.pid) == [] and not (tmp_path / "decode.pid").exists()


def test_one_that_ignores_term_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages.use("en")
    stubborn = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"],
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    assert stubborn.stdout is not None and stubborn.stdout.readline() == b"ready\n"
    stubborn.stdout.close()
    write(tmp_path, "proxy", **identity(stubborn.pid))
    parts.stop_parts(tmp_path, 0.1, ["proxy", "nobody"])
    assert stubborn.wait(5) == -signal.SIGKILL
    assert f"proxy (process group {stubborn.pid}) did not end within 0.1 s after TERM: KILL" in capsys.readouterr().err


def test_a_reused_pid_is_never_touched(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    for change in ({"start": "1"}, {"boot": "a-former-life"}):
        write(tmp_path, "decode", **{**identity(process.pid), **change})
        parts.stop_parts(tmp_path, 1, ["decode"])
        assert process.poll() is None and not (tmp_path / "decode.pid").exists()


def test_children_are_reaped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    short = parts.spawn(["true"], dict(os.environ), tmp_path / "a.pid", {}, folder=tmp_path, log=log)
    long = parts.spawn(["sleep", "60"], dict(os.environ), tmp_path / "decode.pid", {}, folder=tmp_path, log=log)
    left = {short, long}
    while short in left:
        left = parts.reap(left)
    assert left == {long} and proc.read_stat(short) is None
    parts.stop_parts(tmp_path, 5, ["decode"])
    while left:
        left = parts.reap(left)
    assert parts.reap({short}) == set()


def test_a_name_in_parentheses_does_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / "a) b (c"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "60"])
    try:
        stat = proc.read_stat(process.pid)
        assert stat is not None and stat.start.isdigit() and stat.group == os.getpgid(process.pid)
        while not (line := proc.command_line(process.pid)):
            # Popen returns when exec closes its descriptors, a moment before the new arguments can be read.
            time.sleep(0.001)
        assert line.endswith(" 60")
    finally:
        process.kill()
        process.wait()
    assert proc.read_stat(process.pid) is None and proc.command_line(process.pid) == ""
