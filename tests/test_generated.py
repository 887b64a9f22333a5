"""The files that are made from the tables of settings and commands: up to date, and understood by their readers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pexpect
import pytest

from disagg_machine.cli import COMMANDS as MACHINE
from disagg_proxy.config.commands import COMMANDS
from disagg_proxy.config.table import SETTINGS
from tools import man_page
from tools.command_line import program
from tools.generate import generated
from tools.settings_tables import ROOT

BASH, ZSH, FISH = (ROOT / "completions" / name for name in ("disagg-proxy.bash", "_disagg-proxy", "disagg-proxy.fish"))
SCRIPT = ROOT / "test_single_machine.sh"


def need(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("path", generated(), ids=lambda path: path.name)
def test_generated_files_are_those_of_the_code(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == generated()[path], "run: make tables"


def test_every_command_setting_and_flag_is_in_the_tree() -> None:
    found = {" ".join(one.path): one for one in program().all()}
    assert {*COMMANDS, "serve", *(f"machine {name}" for name in MACHINE)} <= set(found)
    flags = {flag for option in found["serve"].options for flag in option.flags}
    assert {setting.flag for setting in SETTINGS} <= flags
    by_flag = {option.flags[-1]: option for option in found["serve"].options}
    assert by_flag["--log-level"].choices == ("debug", "info", "warning", "error")
    assert by_flag["--prefill"].repeated and by_flag["--access-log"].file
    assert "session" in by_flag["--decode-policy"].choices
    assert found["machine logs"].parts and {one.flags for one in found["machine logs"].options} == {("-f",), ("-n",)}


OFFERED = [
    ("disagg-proxy mach", {"machine"}),
    ("disagg-proxy --log-form", {"--log-format"}),
    ("disagg-proxy --log-format j", {"json"}),
    ("disagg-proxy serve --decode-policy ses", {"session"}),
    ("disagg-proxy machine do", {"doctor"}),
    ("disagg-proxy machine all --no", {"--no-supervise"}),
    ("disagg-proxy bench sweep --que", {"--question"}),
    ("./test_single_machine.sh do", {"doctor"}),
    ("./test_single_machine.sh all --no", {"--no-supervise"}),
    ("./test_single_machine.sh restart decode", {"decode", "decode1"}),
    ("./test_single_machine.sh logs su", {"supervisor"}),
    ("./test_single_machine.sh config z", {"zh"}),
]
"""A line, and what its last word may become; decode1 runs."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder from which the lines are typed, where one part has a PID file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/decode1.pid").write_text("pid=1\n")
    (tmp_path / SCRIPT.name).symlink_to(SCRIPT)
    return tmp_path


@pytest.mark.parametrize(("line", "wanted"), OFFERED)
def test_bash(checkout: Path, line: str, wanted: set[str]) -> None:
    script = (
        f"source '{BASH}'; COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _disagg_proxy; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=checkout)
    assert set(done.stdout.split()) == wanted and not done.stderr


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["disagg-proxy", "--log-format", "=", "j"], ["json"]),
        (["disagg-proxy", "--log-format", "="], ["text", "json"]),
        (["disagg-proxy", "--http-port", ""], []),
        (["disagg-proxy", "bench", "write", "test_sin"], ["test_single_machine.sh"]),
        (["disagg-proxy", "chaos", "--json", "test_sin"], ["test_single_machine.sh"]),
    ],
)
def test_bash_and_values_of_options(checkout: Path, words: list[str], wanted: list[str]) -> None:
    script = f'source \'{BASH}\'; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _disagg_proxy; echo "${{COMPREPLY[*]}}"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True, cwd=checkout
    )
    assert done.stdout.split() == wanted


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_zsh(checkout: Path, tmp_path: Path) -> None:
    zsh = need("zsh")
    environment = {"PATH": os.environ["PATH"], "TERM": "xterm", "HOME": str(tmp_path), "PS1": "> "}
    shell = pexpect.spawn(zsh, ["-f", "-i"], env=environment, cwd=str(checkout), encoding="utf-8", timeout=20)
    shell.expect_exact("> ")
    shell.sendline(
        f"autoload -Uz compinit; compinit -u -d {tmp_path}/dump; source '{ZSH}'; unsetopt beep; echo rea''dy"
    )
    shell.expect_exact("ready")
    for line, wanted in OFFERED:
        if len(wanted) == 1:
            shell.send(line + "\t")
            shell.expect_exact(next(iter(wanted))[len(line.split()[-1]) :])
            shell.send("\x15")
    # What runs is offered beside the names of the roles.
    shell.send("./test_single_machine.sh restart decode\t\t")
    shell.expect_exact("decode1")
    shell.close()


@pytest.mark.parametrize(("line", "wanted"), OFFERED)
def test_fish(checkout: Path, tmp_path: Path, line: str, wanted: set[str]) -> None:
    script = f"source '{FISH}'; complete -C '{line}'"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(
        [need("fish"), "-N", "-c", script], capture_output=True, text=True, cwd=checkout, env=environment
    )
    assert {shown.split("\t")[0] for shown in done.stdout.splitlines()} == wanted, done.stderr


def test_the_man_page_is_rendered_without_a_warning() -> None:
    words = [need("groff"), "-man", "-Tascii", "-ww", "-P-c", "-P-b", "-P-u", ROOT / man_page.PATH]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    shown = " ".join(done.stdout.split())
    for setting in SETTINGS:
        assert setting.flag in shown and setting.env in shown
    for name in (*COMMANDS, *MACHINE):
        assert name in shown
    for part in ("NAME disagg-proxy - One", "EXIT STATUS", "SIGHUP", "--role ROLE", "FREEZE_AFTER_MIN, default 20]"):
        assert part in shown


def test_man_shows_it(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "MANPAGER": "cat",
        "MANWIDTH": "100",
        "LC_ALL": "C",
        "HOME": str(tmp_path),
    }
    words = [need("man"), "-l", ROOT / man_page.PATH]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if "not available" in done.stderr or "has been minimized" in done.stdout:
        pytest.skip("man shows no pages here")
    assert done.returncode == 0 and "disagg-proxy" in done.stdout
