"""Through a pseudo-terminal: the menu, each of its entries, and the three-terminal way with Ctrl+C."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from tests.script.machine import Machine, wait_for

# The test runner has threads, about which Python 3.12 and newer warn at every fork.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")

Terminal = Callable[..., "pexpect.spawn[str]"]


@pytest.fixture
def terminal(machine: Machine) -> Iterator[Terminal]:
    """A terminal of its own for each command; closed at the end."""
    opened: list[pexpect.spawn[str]] = []

    def open_one(*words: str, **changes: str) -> pexpect.spawn[str]:
        machine.run_dir.parent.mkdir(parents=True, exist_ok=True)
        command = machine.command(*words)
        one = pexpect.spawn(
            command[0],
            command[1:],
            env={**machine.env, **changes},
            cwd=str(machine.run_dir.parent),
            encoding="utf-8",
            timeout=60,
            dimensions=(50, 200),
        )
        one.delaybeforesend = None
        opened.append(one)
        return one

    yield open_one
    for one in opened:
        one.close(force=True)


def ended(child: pexpect.spawn[str]) -> int | None:
    child.expect(pexpect.EOF)
    child.wait()
    return child.exitstatus


PROMPT = "Your choice: "


def test_every_entry_of_the_menu(machine: Machine, terminal: Terminal) -> None:
    menu = terminal()
    menu.expect(r"1\) proxy")
    shown = str(menu.before)
    menu.expect(PROMPT)
    shown += str(menu.before)
    entries = re.findall(r"(\d+)\) (\S+)", shown)
    assert entries[:6] == [
        ("2", "prefill"),
        ("3", "decode"),
        ("4", "all"),
        ("5", "test"),
        ("6", "config"),
        ("7", "status"),
    ]

    def choose(number: str, *answers: str) -> str:
        menu.sendline(number)
        for answer in answers:
            menu.expect_exact(answer)
        menu.expect_exact(PROMPT)
        return str(menu.before)

    choose("5", "no proxy answers", "exit code 3")
    choose("6", "DECODE_HTTP_PORT", machine.env["DECODE_HTTP_PORT"])
    choose("7", "Nothing is running")
    choose("8", "no logs")
    choose("11", "ports of decode are free")
    choose("13", "disagg_sim --role decode")
    choose("14", "no proxy answers", "exit code 3")
    choose("17", "Settings, by environment")
    choose("99", "no entry")
    choose("4", "SIMULATED ENGINES", "Waiting for", "Everything is ready", "curl http")
    choose("5", "completion", "->", "stream", "chat", "All requests were answered")
    choose("7", "1 pair(s)")
    choose("14", machine.url, "ssh -L")
    choose("15", "Serving: 1 pair ready", "Events")
    choose("8", "supervisor.log")
    menu.sendline("12")
    menu.expect_exact("1 report over request rates")
    choose("4", "requests answered")
    menu.sendline("12")
    menu.expect_exact("1 report over request rates")
    choose("9", 'no entry "9"')
    proxy = machine.pid("proxy")
    menu.sendline("10")
    menu.expect_exact("Which part")
    choose("proxy", "Restarted: proxy")
    assert machine.pid("proxy") != proxy
    choose("9", "Stopped:")
    assert len(machine.leftovers()) == 1  # the menu

    for number, name in (("1", "proxy"), ("2", "prefill"), ("3", "decode")):
        menu.sendline(number)
        menu.expect_exact(f"{name} runs here")
        wait_for(lambda name=name: bool(machine.fields(name)))  # type: ignore[misc]
        menu.sendintr()
        menu.expect_exact("exit code 130")
        menu.expect_exact(PROMPT)
        assert machine.fields(name) == {}
    assert len(machine.leftovers()) == 1
    menu.sendline("0")
    assert ended(menu) == 0


def test_end_of_input_quits(terminal: Terminal) -> None:
    menu = terminal("menu")
    menu.expect_exact(PROMPT)
    menu.sendeof()
    assert ended(menu) == 0


def test_ctrl_c_at_the_prompt_quits(terminal: Terminal) -> None:
    menu = terminal()
    menu.expect_exact(PROMPT)
    menu.sendintr()
    assert ended(menu) == 130


def test_menu_in_chinese(terminal: Terminal) -> None:
    menu = terminal(LC_ALL="zh_CN.UTF-8")
    menu.expect_exact("请选择")
    menu.sendline("0")
    assert ended(menu) == 0


def test_three_terminals(machine: Machine, terminal: Terminal) -> None:
    terminals = {}
    for name in ("proxy", "prefill", "decode"):
        terminals[name] = terminal(name)
        terminals[name].expect_exact(f"{name} runs here")
    wait_for(lambda: machine.get("/health").get("pairs") == 1)
    machine.ok("test")
    status = machine.ok("status").stdout
    assert status.count("alive") == 3
    again = machine.run("decode")
    assert again.returncode == 1 and "already runs" in again.stderr
    for name in ("decode", "prefill", "proxy"):
        terminals[name].sendintr()
        assert ended(terminals[name]) == 130
        assert machine.fields(name) == {}
    assert machine.leftovers() == {}


def test_stop_reaches_the_foreground_too(machine: Machine, terminal: Terminal) -> None:
    proxy = terminal("proxy")
    proxy.expect_exact("Serving on")
    machine.ok("stop")
    ended(proxy)
    assert machine.leftovers() == {}


def test_closed_terminal_stops_it(machine: Machine, terminal: Terminal) -> None:
    proxy = terminal("proxy")
    proxy.expect_exact("Serving on")
    # spawn.close() would send more signals, and fail if the proxy needed more than 0.1 s to end.
    proxy.ptyproc.fileobj.close()
    wait_for(lambda: machine.leftovers() == {})


def test_what_all_has_started_outlives_its_terminal_and_hangups(
    machine: Machine, terminal: Terminal, tmp_path: Path
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text("MAX_QUEUE = 7")
    starting = terminal("all", CONFIG_FILE=str(file))
    starting.expect_exact("Everything is ready")
    starting.expect(pexpect.EOF)
    starting.close(force=False)
    names = ("proxy", "prefill", "decode", "supervisor")
    pids = {name: machine.pid(name) for name in names}
    file.write_text("MAX_QUEUE = 8")
    for pid in pids.values():
        os.kill(pid, signal.SIGHUP)
    log = machine.log_dir / "proxy.log"
    wait_for(lambda: f"Reloaded {file}: MAX_QUEUE 8 (was 7)" in log.read_text())
    machine.ok("test")
    assert {name: machine.pid(name) for name in names} == pids


def test_a_foreground_part_that_fails(machine: Machine) -> None:
    done = machine.run("decode", EXTRA_SIM_ARGS="--no-such-flag")
    assert done.returncode == 1 and "--no-such-flag" in done.stderr
    assert machine.fields("decode") == {}


def test_second_of_two(machine: Machine, terminal: Terminal) -> None:
    second = terminal("prefill", "2", PREFILL_GPUS="0,1", DECODE_GPUS="2")
    second.expect_exact(f"prefill2 runs here, ports {int(machine.env['PREFILL_HTTP_PORT']) + 1}")
    wait_for(lambda: bool(machine.fields("prefill2")))
    second.sendintr()
    assert ended(second) == 130
    assert machine.run("prefill", "3", PREFILL_GPUS="0,1").returncode == 2


def test_colours_only_on_a_terminal_that_wants_them(terminal: Terminal) -> None:
    for changes, coloured in (({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({}, False)):
        child = terminal("frobnicate", **changes)
        child.expect(pexpect.EOF)
        assert ("\x1b[31m" in str(child.before)) is coloured
