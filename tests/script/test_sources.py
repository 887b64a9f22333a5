"""The script's own sources: shellcheck, shfmt, and its size."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.script.machine import REPOSITORY, SCRIPT

STAGES = ("tests/run", "tests/compiled", "tests/cluster_ray", "tests/real_vllm", "tests/speed")
CHECKS = [REPOSITORY / name for name in (*STAGES, "tests/lint", "tests/environment.sh", ".ci/run", "tools/wheels")]
COMPLETION = REPOSITORY / "completions/disagg-proxy.bash"


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed (requirements-dev.txt has it)")
    return found


def run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck() -> None:
    run(tool("shellcheck"), "-x", SCRIPT)
    run(tool("shellcheck"), "--shell=bash", COMPLETION)
    run(tool("shellcheck"), "-x", *CHECKS)


def test_shfmt() -> None:
    run(tool("shfmt"), "-i", "2", "-ci", "-d", SCRIPT, COMPLETION, *CHECKS)


def test_ci_runs_every_stage_and_make_names_each() -> None:
    calls = r"^tests/\w+$"
    assert tuple(re.findall(calls, (REPOSITORY / ".ci/run").read_text(), re.M)) == STAGES
    assert "tests/lint" in re.findall(calls, (REPOSITORY / "tests/run").read_text(), re.M)
    targets = dict(re.findall(r"^([a-z-]+):.*\n\t(\S+)$", (REPOSITORY / "Makefile").read_text(), re.M))
    assert set(targets.values()) == {*STAGES, "tests/lint", ".ci/run", "tools/wheels"}
    assert targets["ci"] == ".ci/run" and targets["test"] == "tests/run"


def test_the_script_only_finds_a_python_and_shows_the_menu() -> None:
    """All that a command does is typed and tested in disagg_machine."""
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 200 and not re.search(r"^\s*(source|\.) ", text, re.M)
    assert not (REPOSITORY / "script").exists()


def test_nothing_is_signalled_by_name() -> None:
    for path in (SCRIPT, *(REPOSITORY / "disagg_machine").rglob("*.py")):
        assert not re.search(r"\b(pkill|killall|pidof|pgrep)\b", path.read_text()), path
