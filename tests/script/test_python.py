"""The virtual environment: made when needed, repaired when half made, brought up to date, never put into a foreign
folder. Works on a copy of the script whose requirements are one small package made here, so nothing is downloaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.script.machine import REPOSITORY, Machine
from tests.script.stubs import write_program

# Two virtual environments and three runs of pip, which are slow on a busy machine.
pytestmark = pytest.mark.timeout(900)


def wheel(folder: Path, version: str) -> None:
    """A package with nothing in it."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"script_probe-{version}.dist-info"
    with zipfile.ZipFile(folder / f"script_probe-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr("script_probe.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: script-probe\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


class Checkout:
    """A copy of the script in which the proxy is a program that fails at once."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.folder = folder
        self.machine = machine
        folder.mkdir()
        for package in ("disagg_machine", "disagg_kv"):
            shutil.copytree(REPOSITORY / package, folder / package)
        shutil.copy(REPOSITORY / "test_single_machine.sh", folder)
        (folder / "disagg_prefill_proxy_server.py").write_text("import script_probe, sys; sys.exit(sys.prefix)\n")
        (folder / "requirements-proxy.txt").write_text("script-probe>=1\n")
        # pip takes blanks in PIP_FIND_LINKS for separators, unlike everything else here.
        self.wheels = folder.parent / "wheels"
        wheel(self.wheels, "1.5")
        self.venv = folder / ".venv"

    def all(self, **changes: str) -> subprocess.CompletedProcess[str]:
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}
        return subprocess.run(
            [str(self.folder / "test_single_machine.sh"), "all"],
            env={**self.machine.env, **pip, **changes},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )


@pytest.fixture
def checkout(tmp_path: Path, machine: Machine) -> Checkout:
    return Checkout(tmp_path / "check out", machine)


def test_made_repaired_and_brought_up_to_date(checkout: Checkout) -> None:
    made = checkout.all()
    assert "missing or too old: script-probe" in made.stderr
    assert "is ready" in made.stderr
    # The proxy ran with the environment's Python, which is what it says before it fails.
    assert f"    {checkout.venv}" in made.stderr
    assert made.returncode == 1

    again = checkout.all()
    assert "Making" not in again.stderr and "the virtual environment" in again.stderr

    wheel(checkout.wheels, "2.0")
    (checkout.folder / "requirements-proxy.txt").write_text("script-probe>=2\n")
    changed = checkout.all()
    assert "up to date" in changed.stderr
    site = next(checkout.venv.glob("lib/python*/site-packages"))
    assert (site / "script_probe-2.0.dist-info").is_dir()

    (checkout.venv / ".proxy-requirements").unlink()
    (checkout.venv / "bin/python").unlink()
    repaired = checkout.all()
    assert "Making" in repaired.stderr and f"    {checkout.venv}" in repaired.stderr


def test_a_foreign_folder_is_left_alone(checkout: Checkout) -> None:
    checkout.venv.mkdir()
    (checkout.venv / "thesis.txt").write_text("precious")
    done = checkout.all()
    assert done.returncode == 1 and "VENV_DIR" in done.stderr
    assert (checkout.venv / "thesis.txt").read_text() == "precious"


def test_a_python_without_venv_module(checkout: Checkout, tmp_path: Path) -> None:
    """As Debian's python3 without python3-venv: the exact line to run is printed."""
    python = tmp_path / "debian/python3"
    probe = 'case "$*" in *"import ensurepip, venv"*) exit 1 ;; esac\n'
    write_program(python, f'#!/bin/sh\n{probe}exec {sys.executable} "$@"\n')
    done = checkout.all(PYTHON=str(python))
    assert done.returncode == 1
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    if shutil.which("apt-get"):
        assert f"apt-get install -y {package}" in done.stderr
    else:
        assert package in done.stderr
    assert not checkout.venv.exists()


def test_a_failed_installation_says_why(checkout: Checkout) -> None:
    (checkout.folder / "requirements-proxy.txt").write_text("script-probe>=9\n")
    done = checkout.all()
    assert done.returncode == 1
    assert "venv.log" in done.stderr and "script-probe>=9" in done.stderr
    assert not (checkout.venv / ".proxy-requirements").exists()


def test_an_old_python(checkout: Checkout, tmp_path: Path) -> None:
    python = tmp_path / "old/python3"
    write_program(python, '#!/bin/sh\ncase "$1" in -V) echo "Python 3.8.10" ;; *) exit 1 ;; esac\n')
    done = checkout.all(PYTHON=str(python))
    assert done.returncode == 1 and "Python 3.8.10" in done.stderr
