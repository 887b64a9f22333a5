"""What dies comes back, with the prefills that would stay frozen; what dies too often is given up."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.script.machine import FAST, Machine, wait_for


def kill(machine: Machine, name: str) -> int:
    pid = machine.pid(name)
    os.kill(pid, signal.SIGKILL)
    return pid


def back(machine: Machine, name: str, old: int) -> bool:
    return machine.fields(name).get("pid", "0") not in ("0", str(old))


def pairs(machine: Machine) -> int:
    return int(machine.get("/health").get("pairs", 0))


def serves(machine: Machine) -> bool:
    try:
        return bool(machine.complete(timeout=10)["choices"])
    except OSError:
        return False


def test_decode_killed_under_load(machine: Machine) -> None:
    """Service is back, no request hangs, and the prefill that had sent to it is restarted as well."""
    machine.ok("all", EXTRA_SIM_ARGS="--ping-seconds 0.2 --time-per-output-token 0.01")
    prefill = machine.pid("prefill")
    ended: list[int] = []

    def load(number: int) -> None:
        try:
            machine.complete(max_tokens=100, prompt=f"request {number}")
        except TimeoutError:
            return
        except OSError:
            pass  # an error is an answer
        ended.append(number)

    with ThreadPoolExecutor(8) as pool:
        for number in range(24):
            pool.submit(load, number)
        wait_for(lambda: bool(machine.get("/stats")["instances"][-1]["in_flight"]))
        decode = kill(machine, "decode")
    assert sorted(ended) == list(range(24)), "the others hang"
    wait_for(lambda: back(machine, "decode", decode) and back(machine, "prefill", prefill))
    wait_for(lambda: serves(machine))
    log = machine.log("supervisor")
    assert f"decode (PID {decode}) died" in log
    assert f"prefill (PID {prefill}) has sent KV to decode" in log
    machine.ok("test")
    status = machine.ok("status").stdout
    assert f"PID {decode} died" in status and "had sent KV" in status
    machine.ok("stop")
    assert machine.leftovers() == {}


SOON = {"INSTANCE_EXPIRY": "3", "PROBE_INTERVAL": "1", "FREEZE_AFTER_MIN": "3"}
"""The shortest that the pauses of a busy machine do not exceed."""


def test_a_decode_that_is_stopped_as_a_whole(machine: Machine) -> None:
    """It neither pings nor answers: restarted with the prefill that has sent to it, as one that froze."""
    machine.env |= SOON
    machine.ok("all")
    machine.ok("test")
    old = {name: machine.pid(name) for name in ("proxy", "prefill", "decode")}
    os.kill(old["decode"], signal.SIGSTOP)
    wait_for(lambda: back(machine, "decode", old["decode"]) and back(machine, "prefill", old["prefill"]))
    wait_for(lambda: serves(machine))
    assert machine.pid("proxy") == old["proxy"] and old["decode"] not in machine.leftovers()
    log = machine.log("supervisor")
    assert re.search(rf"decode \(PID {old['decode']}\) is frozen, says the proxy \(its process hangs: no ping", log)
    assert "after TERM: KILL" in log
    wait_for(lambda: machine.run("status").returncode == 0)


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_status_and_doctor_say_what_hangs_and_that_there_is_no_pair(machine: Machine, name: str) -> None:
    machine.env |= SOON
    machine.ok("all", "--no-supervise")
    machine.ok("doctor")
    pid = machine.pid(name)
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: pairs(machine) == 0)
    status, doctor = machine.run("status"), machine.run("doctor")
    assert status.returncode == doctor.returncode == 1
    row = next(line for line in status.stdout.splitlines() if line.startswith(name))
    assert row.split()[4] == "hung" and "does not answer" in row
    assert f"`restart {name}` brings it back" in status.stdout
    missing = f"no {name} instance is ready (one is lost"
    assert "no request can be served" in status.stderr and missing in status.stdout
    assert "No errors" not in doctor.stderr
    assert f"`restart {name}` brings it back" in doctor.stdout and missing in doctor.stdout
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: machine.run("status").returncode == 0)
    machine.ok("doctor")


def test_what_still_loads_is_no_error(machine: Machine) -> None:
    starting = machine.start("all", EXTRA_SIM_ARGS="--ping-seconds 0.2 --startup-seconds 60")
    try:
        wait_for(lambda: machine.fields("decode").get("pid", "0") != "0")
        status = machine.ok("status")
        assert status.stdout.count(" loading") == 2 and "no request can be served" not in status.stderr
    finally:
        starting.terminate()
        starting.wait(60)


def test_prefill_and_proxy_come_back_alone(machine: Machine) -> None:
    machine.ok("all")
    machine.ok("test")
    for name in ("prefill", "proxy"):
        others = {other: machine.pid(other) for other in ("proxy", "prefill", "decode") if other != name}
        old = kill(machine, name)
        wait_for(lambda name=name, old=old: back(machine, name, old))  # type: ignore[misc]
        wait_for(lambda: serves(machine))
        assert {other: machine.pid(other) for other in others} == others
    assert "sent KV" not in machine.log("supervisor")


def test_prefill_that_sent_nothing_stays(machine: Machine) -> None:
    machine.ok("all", PREFILL_GPUS="0", DECODE_GPUS="1,2")
    before = machine.pid("prefill")
    old = kill(machine, "decode2")
    wait_for(lambda: back(machine, "decode2", old))
    assert machine.pid("prefill") == before
    wait_for(lambda: pairs(machine) == 2)


def test_a_crash_loop_ends(machine: Machine) -> None:
    machine.ok("all", RESTART_LIMIT="2", RESTART_BACKOFF="0.05")
    for _ in range(3):
        wait_for(lambda: machine.fields("decode").get("pid", "0") != "0")
        old = kill(machine, "decode")
        wait_for(lambda old=old: machine.fields("decode").get("pid") != str(old))  # type: ignore[misc]
    wait_for(lambda: "given up" in machine.log("supervisor"))
    status = machine.run("status")
    assert status.returncode == 1 and "given up" in status.stdout and "given-up" in status.stdout
    assert machine.log("supervisor").count("decode started again") == 2
    machine.ok("restart", "decode")
    wait_for(lambda: serves(machine))
    assert "given up" not in machine.ok("status").stdout


def test_waits_double(machine: Machine) -> None:
    machine.ok("all", RESTART_BACKOFF="0.2")
    for wait in ("0.2", "0.4", "0.8"):
        wait_for(lambda: machine.fields("proxy").get("pid", "0") != "0")
        kill(machine, "proxy")
        wait_for(lambda wait=wait: f"restart in {wait} s" in machine.log("supervisor"))  # type: ignore[misc]


def test_a_part_that_was_stopped_stays_stopped(machine: Machine) -> None:
    machine.ok("all")
    machine.ok("stop", "decode")
    prefill = kill(machine, "prefill")
    wait_for(lambda: back(machine, "prefill", prefill))  # the supervisor has looked at everything meanwhile
    assert machine.fields("decode") == {}


def test_no_supervise(machine: Machine) -> None:
    machine.ok("all", "--no-supervise", EXTRA_SIM_ARGS=FAST)
    assert machine.fields("supervisor") == {}
    machine.ok("stop")


def test_all_after_everything_was_given_up(machine: Machine) -> None:
    """The supervisor of before goes, so that there are never two."""
    machine.ok("all", RESTART_BACKOFF="30")
    first = machine.pid("supervisor")
    for name in ("proxy", "prefill", "decode"):
        kill(machine, name)
    wait_for(lambda: all(machine.fields(name).get("pid") == "0" for name in ("proxy", "prefill", "decode")))
    machine.ok("all")
    assert machine.pid("supervisor") != first and first not in machine.leftovers()
    machine.ok("test")


def test_stop_while_a_restart_is_due(machine: Machine) -> None:
    machine.ok("all", RESTART_BACKOFF="30")
    kill(machine, "decode")
    wait_for(lambda: "decode (PID" in machine.log("supervisor"))
    machine.ok("stop")
    assert machine.leftovers() == {}
