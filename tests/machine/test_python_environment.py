"""Which Python runs the proxy. Making the virtual environment is tested from outside (tests/script/test_python.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from disagg_machine import messages, python_environment
from disagg_machine.messages import MachineError
from disagg_machine.probes.requirements_met import missing, numbers
from disagg_machine.python_environment import STAMP, Environment
from tests.machine.conftest import MakeContext


def program(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_of_a_checkout_it_is_python3_on_the_path(make_context: MakeContext, tmp_path: Path) -> None:
    (tmp_path / "requirements-proxy.txt").write_text("")
    found = program(tmp_path / "bin/python3", "exit 0")
    context = make_context(PATH=str(tmp_path / "bin"))
    assert python_environment.base_python(context) == found


def test_of_an_installed_package_it_is_its_own(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context(PATH=str(tmp_path / "bin"))
    assert python_environment.ensure(context) == sys.executable
    other = program(tmp_path / "bin/python", 'case "$*" in *disagg_proxy*) exit 1 ;; esac')
    with pytest.raises(MachineError) as refused:
        python_environment.ensure(make_context(PYTHON=other))
    assert (refused.value.key, refused.value.arguments) == ("python_lacks", (other, "disagg-proxy"))


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("old/python", 'test "$1" = -V && echo "Python 3.8.10"; exit 1', "python_too_old"),
        ("none", "", "no_python"),
    ],
)
def test_what_cannot_be_used(make_context: MakeContext, tmp_path: Path, name: str, text: str, key: str) -> None:
    if text:
        program(tmp_path / name, text)
    with pytest.raises(MachineError) as refused:
        python_environment.base_python(make_context(PYTHON=str(tmp_path / name)))
    messages.use("en")
    assert refused.value.key == key and "PYTHON" in str(refused.value) and str(tmp_path / name) in str(refused.value)


def test_an_environment_is_ready_while_its_requirements_stay(tmp_path: Path) -> None:
    """The stamp is cksum's, as environments of earlier versions have it."""
    requirements = tmp_path / "requirements-proxy.txt"
    requirements.write_text("quart>=0.20\n")
    one = Environment(tmp_path / "venv", requirements, tmp_path / "log")
    assert not one.ready()
    program(one.python, "exit 0")
    with open(requirements) as file:
        cksum = subprocess.run(["cksum"], stdin=file, capture_output=True, text=True, check=True).stdout
    (one.folder / STAMP).write_text(cksum)
    assert one.ready()
    requirements.write_text("quart>=0.21\n")
    assert not one.ready()
    (one.folder / STAMP).write_text(one.stamp())
    assert one.ready()
    program(one.python, "exit 1")
    assert not one.ready()


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/thesis.txt").write_text("precious")
    with pytest.raises(MachineError) as refused:
        Environment(tmp_path / "venv", tmp_path / "requirements", tmp_path / "log").make("python3")
    assert refused.value.key == "venv_not_ours"


def test_packages_that_are_missing() -> None:
    lines = "# comment\npytest>=1.0\nno-such-package[extra]>=2 # why\npytest>=999.1,<1000\n\n"
    assert missing(lines) == ["no-such-package", "pytest>=999.1"]


def test_packages_for_older_pythons_only() -> None:
    now, next_one = (f"{sys.version_info.major}.{sys.version_info.minor + more}" for more in (0, 1))
    assert missing(f'no-such-package>=2.0; python_version < "{now}"') == []
    assert missing(f'no-such-package>=2.0; python_version < "{next_one}"') == ["no-such-package"]
    assert numbers("1.26.0rc1") == (1, 26, 0) and numbers("2.x") == (2,)
