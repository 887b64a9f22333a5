"""Engines that the proxy calls frozen: which are ended, which are left alone, what is said.

The proxy is a stand-in that says what a test tells it to (told_proxy.py); a stopped process (SIGSTOP) is the engine
that does not even react to TERM.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.script.machine import Machine, wait_for
from tests.script.told import FROZEN, REASON, Told, pids, restarted


@pytest.fixture
def told(machine: Machine, tmp_path: Path) -> Told:
    return Told(machine, tmp_path / "told")


def test_a_frozen_decode_and_its_prefill(machine: Machine, told: Told) -> None:
    """Both down, then both up; and the wish that stands for a moment longer does not hit the new ones."""
    machine.ok("all")
    told.wait_for_content()
    old = pids(machine)
    os.kill(old["decode"], signal.SIGSTOP)
    told.says(decode=FROZEN)
    wait_for(lambda: restarted(machine, decode=old["decode"], prefill=old["prefill"]))
    new = pids(machine)
    assert new["proxy"] == old["proxy"]
    assert not {old["decode"], old["prefill"]} & set(machine.leftovers())
    log = machine.log("supervisor")
    moments = [
        log.index(f"decode (PID {old['decode']}) is frozen, says the proxy ({REASON}), and is ended"),
        log.index("after TERM: KILL"),
        log.index("restart in 0.1 s (death 1, limit 5)"),
        log.index(f"prefill (PID {old['prefill']}) has sent KV to decode"),
        log.index("started again"),
    ]
    assert moments == sorted(moments)
    told.wait_for_no_effect()
    assert pids(machine) == new
    told.says()
    status = machine.ok("status").stdout
    assert f"PID {old['decode']} was frozen: {REASON}" in status and "had sent KV to decode" in status


def test_a_frozen_prefill_alone(machine: Machine, told: Told) -> None:
    machine.env["API_KEY"] = "front-door"
    machine.ok("all")
    told.wait_for_content()
    old = pids(machine)
    told.says(prefill=FROZEN)
    wait_for(lambda: restarted(machine, prefill=old["prefill"]))
    assert {**pids(machine), "prefill": old["prefill"]} == old
    assert set(told.asked) == {"200"}


def test_a_prefill_that_sent_nothing_stays(machine: Machine, told: Told) -> None:
    told.says(served=0)
    machine.ok("all")
    told.wait_for_content()
    old = pids(machine)
    told.says(served=0, decode=FROZEN)
    wait_for(lambda: restarted(machine, decode=old["decode"]))
    assert {**pids(machine), "decode": old["decode"]} == old


def test_freezing_again_and_again_ends(machine: Machine, told: Told) -> None:
    machine.ok("all", RESTART_LIMIT="1", RESTART_BACKOFF="0.05")
    for _ in range(2):
        wait_for(lambda: machine.fields("prefill").get("pid", "0") != "0")
        told.says()
        told.wait_for_content()
        old = machine.pid("prefill")
        told.says(prefill=FROZEN)
        wait_for(lambda old=old: machine.fields("prefill").get("pid") != str(old))  # type: ignore[misc]
    wait_for(lambda: "prefill died or froze 2 times within 600 s: given up" in machine.log("supervisor"))
    told.says()
    status = machine.run("status")
    assert status.returncode == 1 and "given-up" in status.stdout
    assert f"gone 2 times, at last: PID {old} was frozen: {REASON}" in status.stdout
    assert machine.fields("prefill")["pid"] == "0" and old not in machine.leftovers()
    machine.ok("restart", "prefill")
    assert "given up" not in machine.ok("status").stdout


def test_what_is_left_alone(machine: Machine, told: Told) -> None:
    """An engine that the proxy still tries to bring back, and somebody else's on the same ports."""
    machine.ok("all")
    told.wait_for_content()
    old = pids(machine)
    told.says(decode={**FROZEN, "restart_wanted": False})
    told.wait_for_no_effect()
    status = machine.run("status")
    assert status.returncode == 1
    row = next(line for line in status.stdout.splitlines() if line.startswith("decode"))
    assert row.split()[4] == "frozen" and f"proxy: frozen, 7 in flight ({REASON})" in row
    told.says(elsewhere=True, prefill=FROZEN, decode=FROZEN)
    told.wait_for_no_effect()
    assert pids(machine) == old
    assert "frozen" not in machine.ok("status").stdout
    assert "frozen" not in machine.log("supervisor")


def test_an_engine_in_a_terminal_is_left_alone(machine: Machine, told: Told) -> None:
    machine.ok("all")
    machine.ok("stop", "prefill")
    terminal = machine.start("prefill")
    try:
        wait_for(lambda: machine.fields("prefill").get("mode") == "foreground")
        told.wait_for_content()
        old = pids(machine)
        told.says(prefill=FROZEN, decode=FROZEN)
        wait_for(lambda: restarted(machine, decode=old["decode"]))
        told.wait_for_no_effect()
        assert machine.pid("prefill") == old["prefill"]
        log = machine.log("supervisor")
        for said in (
            f"prefill (PID {old['prefill']}) has sent KV to decode and would stay frozen, but runs in a terminal",
            f"prefill (PID {old['prefill']}) is frozen, says the proxy ({REASON}), but runs in a terminal",
        ):
            assert log.count(said) == 1
        assert "stop it in its terminal" in machine.run("status").stdout
    finally:
        terminal.terminate()
        terminal.wait(60)


def test_without_a_supervisor_the_remedy_is_said(machine: Machine, told: Told) -> None:
    machine.ok("all", "--no-supervise")
    told.says(decode=FROZEN)
    old = pids(machine)
    status = machine.run("status")
    assert status.returncode == 1 and "`restart decode` brings it back" in status.stdout
    doctor = machine.run("doctor")
    assert doctor.returncode == 1 and f"decode is frozen, says the proxy: {REASON}." in doctor.stdout
    assert pids(machine) == old


def test_a_proxy_that_does_not_answer(machine: Machine, told: Told) -> None:
    """What dies meanwhile is still restarted, and the prefill with it: nobody can say that it has sent nothing."""
    machine.ok("all")
    told.wait_for_content()
    old = pids(machine)
    os.kill(old["proxy"], signal.SIGSTOP)
    try:
        os.kill(old["decode"], signal.SIGKILL)
        wait_for(lambda: restarted(machine, decode=old["decode"], prefill=old["prefill"]))
        status = machine.run("status")
        assert status.returncode == 1 and "does not answer" in status.stdout
    finally:
        os.kill(old["proxy"], signal.SIGCONT)


def test_a_wish_from_before_the_first_look(machine: Machine, told: Told) -> None:
    """It may be about the process before, so it counts only once this one has run for a minute."""
    told.says(prefill=FROZEN)
    machine.ok("all")
    old = pids(machine)
    told.wait_for_no_effect()
    assert pids(machine) == old
    fields = machine.fields("prefill")
    fields["since"] = str(int(fields["since"]) - 60)
    (machine.run_dir / "new").write_text("".join(f"{key}={value}\n" for key, value in fields.items()))
    (machine.run_dir / "new").rename(machine.run_dir / "prefill.pid")
    wait_for(lambda: restarted(machine, prefill=old["prefill"]))
    assert {**pids(machine), "prefill": old["prefill"]} == old
