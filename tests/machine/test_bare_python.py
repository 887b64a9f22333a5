"""`stop`, `status`, `logs` and `help` where the virtual environment is broken: a Python without any package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from disagg_machine import proc
from disagg_machine.context import PACKAGE

SCRIPT = PACKAGE.parent / "test_single_machine.sh"
BARE = [sys.executable, "-I", "-S", str(PACKAGE / "__main__.py")]
HEAVY = {"asyncio", "email", "http.client", "importlib.metadata", "logging", "site", "urllib.request"}
"""Modules that take long to import."""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A broken virtual environment, and one part that has died."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/nowhere/python\n")
    python.chmod(0o755)
    (tmp_path / "venv/pyvenv.cfg").write_text("")
    (tmp_path / "run/logs").mkdir(parents=True)
    (tmp_path / "run/proxy.pid").write_text(f"pid=4194305\nstart=1\nboot={proc.boot_id()}\nrole=proxy\nkind=proxy\n")
    (tmp_path / "run/logs/proxy.log").write_text("the last line\n")
    return {
        "PATH": os.environ["PATH"],
        "LC_ALL": "C.UTF-8",
        "RUN_DIR": str(tmp_path / "run"),
        "VENV_DIR": str(tmp_path / "venv"),
        "PYTHON": str(python),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("way", [BARE, [str(SCRIPT)]], ids=["package", "script"])
def test_what_must_always_work(environ: dict[str, str], way: list[str]) -> None:
    shown = run([*way, "help"], environ)
    assert shown.returncode == 0 and "VENV_DIR" in shown.stdout and shown.stderr == ""
    status = run([*way, "status"], environ)
    assert status.returncode == 1 and "proxy" in status.stdout and "dead" in status.stdout and status.stderr == ""
    logs = run([*way, "logs", "proxy"], environ)
    assert (logs.returncode, logs.stdout, logs.stderr) == (0, "the last line\n", "")
    stopped = run([*way, "stop"], environ)
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (0, "", "Stopped: proxy\n")
    assert run([*way, "status"], environ).returncode == 3


def test_what_needs_the_python_names_it(environ: dict[str, str]) -> None:
    done = run([str(SCRIPT), "all"], environ)
    assert done.returncode == 1 and environ["PYTHON"] in done.stderr and "set PYTHON" in done.stderr


def test_stop_works_in_a_folder_that_is_gone(environ: dict[str, str], tmp_path: Path) -> None:
    program = (
        f"import os, sys; os.mkdir({str(tmp_path / 'gone')!r}); os.chdir({str(tmp_path / 'gone')!r}); "
        f"os.rmdir({str(tmp_path / 'gone')!r}); os.execv({sys.executable!r}, {[*BARE, 'stop']!r})"
    )
    done = run([sys.executable, "-c", program], environ)
    assert (done.returncode, done.stderr) == (0, "Stopped: proxy\n")


def test_no_python_at_all(environ: dict[str, str], tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "readlink"):
        found = next(Path(folder, name) for folder in os.environ["PATH"].split(":") if Path(folder, name).exists())
        (tools / name).symlink_to(found)
    for locale, words in (("C.UTF-8", "no Python 3.10 or newer found"), ("zh_CN.UTF-8", "找不到 3.10")):
        done = run(["bash", str(SCRIPT), "help"], {**environ, "PATH": str(tools), "LC_ALL": locale})
        assert done.returncode == 1 and words in done.stderr and "PYTHON" in done.stderr


@pytest.mark.parametrize("command", ["help", "config", "status", "stop"])
def test_they_answer_at_once(environ: dict[str, str], command: str) -> None:
    """A command that starts nothing takes about a tenth of a second, most of it Python's own start."""
    program = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); from disagg_machine.cli import main; "
        f"main([{command!r}]); print(*sys.modules, file=sys.stderr)"
    )
    done = run([sys.executable, "-I", "-S", "-c", program], environ)
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "disagg_machine.cli" in loaded and loaded & HEAVY == set()
    if command == "help":
        assert {name for name in loaded if name.startswith("disagg_machine.")} <= {
            f"disagg_machine.{name}"
            for name in (
                "cli", "context", "files", "messages", "messages.english", "net", "parts", "proc", "settings",
                "signals", "table", "ui", "values",
            )
        }  # fmt: skip
