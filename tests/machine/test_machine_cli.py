"""The commands: their table, help, usage and exit codes."""

from __future__ import annotations

import importlib
import re

import pytest

from disagg_machine import cli, menu, messages
from disagg_machine.cli import COMMANDS, HIDDEN, main
from disagg_machine.table import SETTINGS


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    messages.use("en")


@pytest.mark.parametrize("command", [*COMMANDS.values(), *HIDDEN.values()], ids=lambda one: one.name)
def test_every_command_has_its_function(command: cli.Command) -> None:
    if command.name != "help":
        assert callable(getattr(importlib.import_module(f"disagg_machine.{command.module}"), f"cmd_{command.name}"))


def test_help_names_every_command_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--script=./test_single_machine.sh", "help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: test_single_machine.sh [COMMAND]")
    assert re.findall(r"^  ([a-z]+) ", shown.split("Settings,")[0], re.M) == list(COMMANDS)
    for setting in SETTINGS:
        assert re.search(rf"^  {setting.env}(=.*)?$", shown, re.M)


@pytest.mark.parametrize("words", [["-h"], ["--help"]])
def test_other_words_for_help(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("Usage: disagg-proxy machine [COMMAND]")


def test_no_command_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr() == ("", "Usage: disagg-proxy machine [COMMAND]; without a command, on a terminal: the "
                                   "menu. `help` lists everything.\n")  # fmt: skip


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frobnicate"]) == 2
    assert 'unknown command "frobnicate"' in capsys.readouterr().err


def test_a_bad_setting_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY_PORT", "0")
    assert main(["--script=/a b/name", "status"]) == 2
    assert capsys.readouterr() == ("", 'name: HTTP_PROXY_PORT="0": must be a port, 1 to 65535\n')


@pytest.mark.parametrize("tongue", ["en", "zh"])
def test_markdown(capsys: pytest.CaptureFixture[str], tongue: str) -> None:
    assert main(["config", "--markdown", tongue]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [setting.env for setting in SETTINGS]
    assert main(["config", "--markdown", "fr"]) == 2


def test_the_menu_has_every_command_but_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(menu.ENTRIES) == set(COMMANDS) - {"menu"}
    assert main(["__menu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[6:]] == [
        *([str(number), name] for number, name in enumerate(menu.ENTRIES, 1)),
        ["0", "quit"],
    ]
    assert lines[6:12] == [
        "1 proxy start the proxy (foreground)",
        "2 prefill start the prefill engine (foreground)",
        "3 decode start the decode engine (foreground)",
        "4 all start everything in the background",
        "5 test check and test the service",
        "6 config show the configuration",
    ]
    assert lines[4].count("%s") == 1 and lines[5].count("%s") == 2
