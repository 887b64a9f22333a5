"""The wheels of tools/wheels: each in a fresh environment, and the native code of one in a checkout. Building takes
more than a minute, so ``tests/compiled`` does it, once."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_compiler import UNPACK
from tests.script.machine import Machine
from tests.script.test_compiled import Checkout

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif("WHEELS" not in os.environ, reason="tests/compiled builds the wheels"),
]


def wheel(kind: str) -> Path:
    """The wheel that ``kind`` names: compiled or pure."""
    found = Path(os.environ["WHEELS"]).glob("disagg_proxy-*.whl")
    (one,) = [path for path in found if path.name.endswith("-none-any.whl") == (kind == "pure")]
    return one


class Installed(Machine):
    """``disagg-proxy machine`` of a wheel in an environment of its own."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__(folder)
        self.bin = folder / "fresh/bin"
        del self.env["PYTHON"], self.env["PROXY_COMPILED"]
        folder.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", str(self.bin.parent)], check=True)
        pip = [self.bin / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel(kind)]
        subprocess.run(pip, check=True, cwd=folder)

    def command(self, *words: str) -> list[str]:
        return [str(self.bin / "disagg-proxy"), "machine", *words]


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    one = Checkout(tmp_path / "a folder")
    yield one
    assert one.clean_up() == {}


@pytest.mark.parametrize(("kind", "how"), [("pure", "interpreted"), ("compiled", "compiled")])
def test_a_wheel_serves_from_a_fresh_environment(kind: str, how: str, tmp_path: Path) -> None:
    installed = Installed(tmp_path / "a folder", kind)
    try:
        said = subprocess.run([installed.bin / "disagg-proxy", "--version"], capture_output=True, text=True, check=True)
        assert f" ({how}, Python " in said.stdout
        installed.ok("all")
        assert installed.get("/stats")["compiled"] is (kind == "compiled")
        assert how in installed.ok("status").stdout
        installed.ok("test")
    finally:
        assert installed.clean_up() == {}


def test_a_pure_wheel_has_no_native_code_and_nothing_of_an_earlier_build(tmp_path: Path) -> None:
    names = zipfile.ZipFile(wheel("pure")).namelist()
    assert not [name for name in names if name.endswith(".so")]
    root = Path(__file__).parents[2]
    assert [name for name in names if name.endswith(".py") and not (root / name).is_file()] == []


def test_a_checkout_runs_native_code_and_after_an_edit_its_own(checkout: Checkout) -> None:
    checkout.compiler.answer(UNPACK.format(wheel=str(wheel("compiled"))))
    checkout.ok("all", PROXY_COMPILED="1", EXTRA_PROXY_ARGS="--workers 2")
    assert checkout.compiled and checkout.complete()["choices"]
    maps = Path(f"/proc/{checkout.get('/stats')['workers'][0]['pid']}/maps").read_text()
    assert str(checkout.compiler.store.folder) in maps
    checkout.ok("test")
    checkout.edit("disagg_proxy/runtime/inline_coroutine.py")
    checkout.ok("restart", "proxy", EXTRA_PROXY_ARGS="--workers 1")
    assert not checkout.compiled and checkout.complete()["choices"]
