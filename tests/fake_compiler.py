"""A compiler's environment (disagg_machine/compiled) whose Python compiles nothing: one module becomes bytecode alone,
which ``disagg_proxy.compiled()`` takes for native code. It can be held, and can fail."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from disagg_machine.compiled import build, identity
from disagg_machine.compiled.store import Store
from disagg_machine.python_environment import STAMP

MODULE = "disagg_proxy/runtime/inline_coroutine"

_PROGRAM = """\
#!{python}
import os, pathlib, py_compile, sys, time
if sys.argv[1] == "-c":
    sys.exit()
here = pathlib.Path({folder!r})
assert sys.argv[1:] == ["setup.py", "build_ext", "--inplace"] and os.environ["DISAGG_PROXY_COMPILE"] == "1"
assert "PYTHONPATH" not in os.environ and "DISAGG_KV_SECRET" not in os.environ
with open(here / "builds", "a") as file:
    file.write(f"{{os.getpid()}}\\n")
while (here / "hold").exists():
    time.sleep(0.02)
if (here / "fail").exists():
    sys.exit("inline_coroutine.c: internal compiler error")
exec((here / "answer").read_text())
"""

PRETEND = f"""\
module = pathlib.Path({MODULE!r})
py_compile.compile(str(module.with_suffix(".py")), str(module.with_suffix(".pyc")), doraise=True)
module.with_suffix(".py").unlink()
"""

UNPACK = """\
import zipfile
with zipfile.ZipFile({wheel!r}) as wheel:
    wheel.extractall(members=[name for name in wheel.namelist() if name.endswith(".so")])
"""
"""What a build does: as if it compiled; the native code of a wheel."""


class FakeCompiler:
    """The compiler for one cache folder, checkout and Python."""

    def __init__(self, cache: Path, checkout: Path, python: str = sys.executable) -> None:
        self.store = Store(cache / "disagg-proxy/compiled", checkout)
        about = identity.python_build(python)
        assert about is not None
        tools = build.environment(self.store, build.compiler(checkout), about, cache / "log")
        self.folder = tools.folder
        tools.python.parent.mkdir(parents=True)
        tools.requirements.write_text(f"{build.compiler(checkout)}\n")
        (self.folder / STAMP).write_text(tools.stamp())
        tools.python.write_text(_PROGRAM.format(python=sys.executable, folder=str(self.folder)))
        tools.python.chmod(0o755)
        self.answer(PRETEND)

    def answer(self, code: str) -> None:
        """What builds do from now on."""
        (self.folder / "answer").write_text(code)

    def hold(self) -> None:
        """Builds wait from now on."""
        (self.folder / "hold").touch()

    def go_on(self) -> None:
        """Builds wait no more."""
        (self.folder / "hold").unlink()

    def fail(self, whether: bool = True) -> None:
        """Builds fail from now on, or do not."""
        if whether:
            (self.folder / "fail").touch()
        else:
            (self.folder / "fail").unlink()

    @property
    def pids(self) -> list[int]:
        """Of every build that has begun to compile."""
        path = self.folder / "builds"
        return list(map(int, path.read_text().split())) if path.exists() else []


def builds(store: Store) -> list[str]:
    """Names of the builds that are there."""
    if not store.folder.is_dir():
        return []
    return sorted(one.name for one in store.folder.iterdir() if one.is_dir() and not one.name.startswith("new-"))


def make_checkout(folder: Path, root: Path) -> Path:
    """A copy of what a checkout needs to run, without what was compiled."""
    folder.mkdir(parents=True)
    for name in ("setup.py", "requirements-proxy.txt", "test_single_machine.sh", identity.SERVER):
        shutil.copy(root / name, folder)
    for name in ("disagg_kv", "disagg_machine", "disagg_power", "disagg_proxy", "disagg_sim"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder
