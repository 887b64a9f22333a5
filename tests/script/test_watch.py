"""`page` and `top`: the live page's address, opened only on a desktop, and the same in a terminal."""

from __future__ import annotations

import os
from pathlib import Path

import pexpect
import pytest

from tests.script.machine import Machine
from tests.script.stubs import write_program

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


@pytest.mark.parametrize("command", ["page", "top"])
def test_without_a_proxy(machine: Machine, command: str) -> None:
    done = machine.run(command)
    assert (done.returncode, done.stdout) == (3, "")
    assert "no proxy answers" in done.stderr


@pytest.mark.parametrize("words", [("page", "x"), ("top", "x"), ("top", "--once", "x")])
def test_wrong_words(machine: Machine, words: tuple[str, ...]) -> None:
    done = machine.run(*words)
    assert done.returncode == 2 and "does not take" in done.stderr


def test_the_address_and_the_terminal(machine: Machine, tmp_path: Path) -> None:
    machine.ok("all", API_KEY="sesame")
    done = machine.ok("page", API_KEY="sesame")
    assert done.stdout == f"{machine.url}/\n", "alone, for scripts"
    assert "ssh -L" in done.stderr and "API_KEY" in done.stderr and "sesame" not in done.stderr
    done = machine.ok("top", API_KEY="sesame")
    assert "Serving: 1 pair ready" in done.stdout and "sesame" not in done.stdout + done.stderr
    assert "服务正常" in machine.ok("top", "--once", API_KEY="sesame", LC_ALL="zh_CN.UTF-8", PYTHONUTF8="1").stdout
    done = machine.run("top", API_KEY="wrong")
    assert done.returncode == 1 and "does not accept this API_KEY" in done.stderr

    # A person before a desktop: the browser gets the address, and not the key.
    stub = tmp_path / "bin"
    stub.mkdir()
    opened = tmp_path / "opened"
    write_program(stub / "xdg-open", f'#!/bin/sh\nprintf "%s" "$*" >"{opened}"\n')
    path = f"{stub}{os.pathsep}{machine.env['PATH']}"
    machine.ok("page", API_KEY="sesame", PATH=path, DISPLAY=":0")
    assert not opened.exists(), "nobody sits there"
    changes = {"API_KEY": "sesame", "PATH": path, "DISPLAY": ":0"}
    child = pexpect.spawn(machine.command("page")[0], ["page"], env={**machine.env, **changes}, encoding="utf-8")
    child.expect_exact("Opened in the browser.", timeout=60)
    child.expect(pexpect.EOF, timeout=60)
    child.close()
    assert opened.read_text() == f"{machine.url}/"

    # Without rich: what to install, in a Python that is not the script's own to install into.
    absent = tmp_path / "without"
    absent.mkdir()
    (absent / "rich.py").write_text("raise ModuleNotFoundError(name='rich')\n")
    elsewhere = str(tmp_path / "venv")
    done = machine.run("top", API_KEY="sesame", PYTHONPATH=str(absent), VENV_DIR=elsewhere)
    assert done.returncode == 1 and "-m pip install -r requirements-top.txt" in done.stderr


def test_all_says_where_to_look(machine: Machine) -> None:
    assert f"Watch it work: {machine.url}/" in machine.ok("all").stderr
