"""Finding a vLLM and what it can do: its files, its own word, and the order in which Pythons are looked at."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from disagg_machine.messages import text
from disagg_machine.probes import vllm_probe
from disagg_machine.vllm_facts import (
    PROBE,
    VllmFacts,
    by_version,
    choose_connector,
    interpreter_of,
    is_untried,
    look_for,
    of_python,
    problem,
    runs_in,
)

NEWEST = "version=0.33.0\nconnector=no\nrandomises=yes\nswitch=yes\n"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The files of a vLLM without anything that the script looks for."""
    folder = tmp_path / "site/vllm"
    (folder / "v1/engine").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('nobody may import this')\n")
    (folder / "_version.py").write_text("__version__ = version = '0.21.3.dev7+g12'\n")
    return folder


def test_facts_of_files(package: Path) -> None:
    assert vllm_probe.facts(package) == {
        "version": "0.21.3.dev7+g12",
        "connector": "no",
        "randomises": "no",
        "switch": "no",
    }
    (package / vllm_probe.CONNECTOR).parent.mkdir(parents=True)
    (package / vllm_probe.CONNECTOR).write_text("")
    (package / "v1/engine/input_processor.py").write_text("request.request_id += random_uuid()\n")
    (package / "envs.py").write_text(f"{vllm_probe.SWITCH} = False\n")
    assert list(vllm_probe.facts(package).values())[1:] == ["yes", "yes", "yes"]
    (package / "_version.py").unlink()
    assert vllm_probe.facts(package)["version"] == "unknown"


def test_the_program_runs_in_any_python_and_imports_no_vllm(package: Path) -> None:
    def run(path: Path) -> subprocess.CompletedProcess[str]:
        begin = f"import runpy, sys; sys.path.insert(0, {str(path)!r})"
        program = f"{begin}; runpy.run_path({str(PROBE)!r}, run_name='__main__')"
        return subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)

    done = run(package.parent)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "version=0.21.3.dev7+g12"), done.stderr
    assert run(package.parent / "nothing").returncode == 1
    # A namespace package, as a folder of data called vllm makes one, is no vLLM.
    (package / "__init__.py").unlink()
    assert run(package.parent).returncode == 1


@pytest.mark.parametrize(
    ("version", "major", "minor", "expected"),
    [
        ("0.9.2", 0, 9, True),
        ("0.9.2", 0, 10, False),
        ("0.21.0", 0, 9, True),
        ("1.0.0rc1", 0, 33, True),
        ("unknown", 0, 33, True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, major: int, minor: int, expected: bool) -> None:
    assert VllmFacts(version).at_least(major, minor) is expected


def known(version: str) -> VllmFacts:
    """A vLLM that only tells its version."""
    found = by_version("/x/vllm", {("/x/vllm", "--version"): f"INFO something\nvLLM {version}\n"}.get)
    assert found and found.command == ("/x/vllm",)
    return found


@pytest.mark.parametrize(
    ("version", "connector", "randomises", "switch"),
    [
        ("0.9.2", True, False, False),
        ("0.14.1", True, True, False),
        ("0.16.0", True, True, True),
        ("0.24.0", False, True, True),
    ],
)
def test_what_is_known_of_a_version(version: str, connector: bool, randomises: bool, switch: bool) -> None:
    assert known(version) == VllmFacts(version, connector, randomises, switch, ("/x/vllm",))


def test_a_program_that_tells_no_version() -> None:
    assert by_version("/x/vllm", lambda _: "usage: vllm\n") is None
    assert by_version("/x/vllm", lambda _: None) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#!/opt/env/bin/python3.12\nimport sys\n", "/opt/env/bin/python3.12"),
        ("#!/usr/bin/env python3\n", "/found/python3"),
        ("#!/bin/sh\n'''exec' \"/a long/env/bin/python\" \"$0\" \"$@\"\n' '''\n", "/a long/env/bin/python"),
        ("#!/bin/sh\n'''exec' /env/bin/python3 \"$0\" \"$@\"\n' '''\n", "/env/bin/python3"),
        ("#!/bin/sh\nexec something\n", None),
        ("\x7fELF", None),
        ("", None),
    ],
)
def test_the_python_of_a_script(tmp_path: Path, text: str, expected: str | None) -> None:
    script = tmp_path / "vllm"
    script.write_text(text)
    assert interpreter_of(str(script), lambda name: name if "/" in name else f"/found/{name}") == expected
    assert interpreter_of(str(script), lambda _: None) is None
    assert interpreter_of(str(tmp_path / "nothing"), lambda name: name) is None


class Machine:
    """Pythons that have a vLLM, and what was run."""

    def __init__(self, *pythons: str, script: Path | None = None) -> None:
        self.pythons = pythons
        self.script = script
        self.ran: list[str] = []

    def run(self, command: Sequence[str]) -> str | None:
        self.ran.append(command[0])
        if command[1] == "--version":
            return "vLLM 0.20.0\n"
        assert command[1:] == (str(PROBE),)
        return NEWEST if command[0] in self.pythons else None

    def which(self, name: str) -> str | None:
        if name == "vllm":
            return str(self.script) if self.script else None
        return name

    def find(self, chosen: bool = False, venv: str | None = "/venv/python") -> VllmFacts | None:
        return look_for("/user/python", venv, chosen, self.run, self.which)


def test_the_order_in_which_a_vllm_is_looked_for(tmp_path: Path) -> None:
    script = tmp_path / "vllm"
    script.write_text("#!/site/python3\n")
    everywhere = ("/user/python", "/venv/python", "/site/python3")
    module = ("-m", "vllm.entrypoints.cli.main")

    found = Machine(*everywhere, script=script).find(chosen=True)
    assert found and found.command == ("/user/python", *module)
    found = Machine(*everywhere, script=script).find()
    assert found == VllmFacts("0.33.0", False, True, True, (str(script),), "/site/python3")
    found = Machine(*everywhere).find()
    assert found and found.command == ("/user/python", *module)
    found = Machine("/venv/python").find()
    assert found and found.command == ("/venv/python", *module)
    found = Machine("/venv/python", script=script).find(chosen=True)
    assert found and (found.command, found.version) == ((str(script),), "0.20.0"), "by its own word"
    nothing = Machine()
    assert nothing.find() is None and nothing.ran == ["/user/python", "/venv/python"]
    assert Machine().find(chosen=True, venv=None) is None


def test_a_python_that_cannot_be_run(tmp_path: Path) -> None:
    assert of_python(str(tmp_path / "nothing"), runs_in({})) is None
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "version=$VERSION"\n')
    program.chmod(0o755)
    found = of_python(str(program), runs_in({"VERSION": "0.30.1"}))
    assert found and found.version == "0.30.1"


def with_facts(version: str, **facts: bool) -> VllmFacts:
    return replace(known(version), **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "found", "expected"),
    [
        ("auto", known("0.9.2"), "p2p_nccl"),
        ("auto", known("0.23.0"), "p2p_nccl"),
        ("auto", known("0.24.0"), "own"),
        ("auto", with_facts("0.33.0", connector=True), "own"),
        ("auto", with_facts("0.22.0", connector=False), "own"),
        ("auto", with_facts("0.20.0", connector=False), "p2p_nccl"),
        ("own", known("0.9.2"), "own"),
        ("p2p_nccl", known("0.33.0"), "p2p_nccl"),
    ],
)
def test_the_connector(setting: str, found: VllmFacts, expected: str) -> None:
    assert choose_connector(found, setting) == expected


@pytest.mark.parametrize(
    ("version", "connector", "engine_host", "expected"),
    [
        ("0.9.1", "p2p_nccl", "127.0.0.1", "vllm_too_old"),
        ("0.8.5", "own", "127.0.0.1", "vllm_too_old"),
        ("0.9.10", "p2p_nccl", "127.0.0.1", ""),
        ("0.9.2", "p2p_nccl", "some-name", ""),
        ("0.20.0", "own", "127.0.0.1", "own_too_old"),
        ("0.21.0", "own", "some-name", "own_wants_ip"),
        ("0.21.0", "own", "localhost", ""),
        ("0.21.0", "own", "0.0.0.0", ""),
        ("0.21.0", "own", "fe80::1", ""),
        ("0.24.0", "p2p_nccl", "127.0.0.1", "vllm_no_connector"),
        ("0.14.1", "p2p_nccl", "127.0.0.1", "vllm_random_ids"),
        ("0.21.0", "p2p_nccl", "127.0.0.1", ""),
    ],
)
def test_what_is_refused_says_what_to_do(version: str, connector: str, engine_host: str, expected: str) -> None:
    message = problem(known(version), connector, engine_host)
    assert (message[0] if message else "") == expected
    if message:
        assert message[1] in (version, engine_host) and message[1] in text(*message)


def test_a_vllm_that_nobody_has_tried() -> None:
    assert is_untried(known("0.34.0"), "own") and not is_untried(known("0.33.2"), "own")
    assert not is_untried(known("0.34.0"), "p2p_nccl")
