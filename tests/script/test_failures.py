"""What goes wrong while starting: said at once, with the reason, and nothing stays."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from tests.script.machine import FAST, Machine, wait_for


@pytest.mark.parametrize("name", ["HTTP_PROXY_PORT", "PROXY_PORT", "DECODE_KV_PORT"])
def test_a_port_that_is_taken(machine: Machine, name: str) -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", int(machine.env[name])))
        holder.listen()
        done = machine.run("all")
        assert done.returncode == 1
        assert f"port {machine.env[name]}" in done.stderr and f"PID {os.getpid()}" in done.stderr
        assert machine.leftovers() == {}
        doctor = machine.run("doctor")
        assert doctor.returncode == 1 and f"PID {os.getpid()}" in doctor.stdout


def test_a_port_given_twice(machine: Machine) -> None:
    done = machine.run("all", DECODE_HTTP_PORT=machine.env["PREFILL_HTTP_PORT"])
    assert done.returncode == 2 and machine.env["PREFILL_HTTP_PORT"] in done.stderr


def test_an_engine_that_dies_while_starting(machine: Machine) -> None:
    done = machine.run("all", EXTRA_SIM_ARGS="--no-such-flag", START_TIMEOUT="600")
    assert done.returncode == 1
    assert "ended while it started" in done.stderr and "--no-such-flag" in done.stderr
    assert machine.leftovers() == {}
    assert machine.run("status").returncode == 3


def test_a_proxy_that_dies_while_starting(machine: Machine) -> None:
    done = machine.run("all", EXTRA_PROXY_ARGS="--no-such-flag")
    assert done.returncode == 1
    assert "proxy (PID" in done.stderr and "--no-such-flag" in done.stderr
    assert machine.leftovers() == {}


def test_an_engine_that_never_gets_ready(machine: Machine) -> None:
    done = machine.run("all", EXTRA_SIM_ARGS="--startup-seconds 100", START_TIMEOUT="3")
    assert done.returncode == 1
    assert "START_TIMEOUT" in done.stderr
    assert machine.leftovers() == {}


def test_two_starts_at_once(machine: Machine) -> None:
    slow = FAST + " --startup-seconds 3"
    first = machine.start("all", EXTRA_SIM_ARGS=slow)
    wait_for(lambda: bool(machine.fields("proxy")))
    second = machine.run("all", EXTRA_SIM_ARGS=slow)
    assert second.returncode == 1 and f"PID {first.pid}" in second.stderr
    assert first.wait(60) == 0
    machine.ok("test")


def test_stop_ends_an_all_that_still_starts(machine: Machine) -> None:
    first = machine.start("all", EXTRA_SIM_ARGS="--startup-seconds 100")
    wait_for(lambda: bool(machine.fields("decode")))
    machine.ok("stop")
    assert first.wait(60) == 143
    assert machine.leftovers() == {}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_interrupted_all_leaves_nothing(machine: Machine, number: signal.Signals, status: int) -> None:
    process = machine.start("all", EXTRA_SIM_ARGS="--startup-seconds 100")
    wait_for(lambda: bool(machine.fields("decode")))
    process.send_signal(number)
    assert process.wait(60) == status
    assert "Stopping what was started" in machine.result(process).stderr
    assert machine.leftovers() == {}


def test_a_killed_all_leaves_no_lock(machine: Machine) -> None:
    process = machine.start("all", EXTRA_SIM_ARGS="--startup-seconds 100")
    wait_for(lambda: bool(machine.fields("decode")))
    process.kill()
    process.wait(60)
    machine.ok("stop")
    assert machine.leftovers() == {}
    machine.ok("all")


def test_stop_of_what_does_not_run(machine: Machine) -> None:
    done = machine.run("stop", "decode")
    assert done.returncode == 3 and "decode" in done.stderr


def test_a_test_that_fails_says_so(machine: Machine) -> None:
    machine.ok("all", SUPERVISE="0")
    assert machine.fields("supervisor") == {}
    os.kill(machine.pid("decode"), signal.SIGKILL)
    done = machine.run("test", TEST_TIMEOUT="3")
    assert done.returncode == 1
    assert "completion" in done.stderr
    status = machine.run("status")
    assert status.returncode == 1 and "dead" in status.stdout
    done = machine.run("all")
    assert done.returncode == 1 and "restart" in done.stderr
    machine.ok("restart", "decode")
    machine.ok("test")


def test_run_dir_of_somebody_else(machine: Machine) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    machine.run_dir.mkdir(parents=True)
    os.chown(machine.run_dir, 65534, 65534)
    done = machine.run("all")
    os.chown(machine.run_dir, 0, 0)
    assert done.returncode == 1 and "RUN_DIR" in done.stderr


def test_no_such_python(machine: Machine) -> None:
    done = machine.run("all", PYTHON="/nowhere/python")
    assert done.returncode == 1 and "PYTHON" in done.stderr
