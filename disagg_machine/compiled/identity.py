"""What a build is bound to: the content of the sources, the recipe, and the Python that will load it.

All modules of the packages count, not only those that are compiled: mypyc takes types and constants from the modules
that they import, and the interpreted modules of a build are those of the same copy.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from disagg_machine.context import PACKAGE

RECIPE = "setup.py"
SERVER = "disagg_prefill_proxy_server.py"
"""What starts the proxy: its folder is where its modules come from."""

SOURCES = (RECIPE, SERVER, "disagg_kv", "disagg_power", "disagg_proxy")
"""Files and folders of a build."""

_MADE = (".pyc", ".so")


@dataclass(frozen=True, slots=True)
class PythonBuild:
    """The Python that runs the proxy, as far as native code depends on it.

    Attributes:
        text: version with its build, ABI, platform and C library.
        compiler: the C compiler that it calls.
        has_compiler: whether that is on PATH.
        header: its Python.h.
        has_header: whether that is there.
        can_make_venv: whether it has the modules that Debian packages separately.
    """

    text: str
    compiler: str
    has_compiler: bool
    header: str
    has_header: bool
    can_make_venv: bool


def python_build(python: str) -> PythonBuild | None:
    """What the Python says of itself; None when it does not run."""
    probe = PACKAGE / "probes" / "python_build.py"
    try:
        done = subprocess.run(
            [python, "-I", "-S", str(probe)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        )
        return PythonBuild(**json.loads(done.stdout))
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None


def source_files(root: Path) -> Iterator[Path]:
    """Every file of :data:`SOURCES`, relative to ``root``, in a fixed order, without bytecode and native code."""
    for name in SOURCES:
        path = root / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (one.relative_to(root) for one in found if one.suffix not in _MADE and one.is_file())


def digest(root: Path, python: PythonBuild) -> str:
    """The name of the build of these sources for this Python.

    Raises:
        OSError: a source file cannot be read.
    """
    found = hashlib.sha256()
    recipe = Path(__file__).with_name("build.py").read_bytes()
    for name, content in [("python", python.text.encode()), ("build", recipe)]:
        _add(found, name, content)
    for path in source_files(root):
        _add(found, str(path), (root / path).read_bytes())
    return found.hexdigest()[:24]


def short(*texts: str) -> str:
    """A name for these texts."""
    found = hashlib.sha256()
    for one in texts:
        _add(found, "", one.encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]


def _add(found: hashlib._Hash, name: str, content: bytes) -> None:
    found.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
    found.update(content)


def is_checkout(root: Path) -> bool:
    """Whether the sources are here; an installed package is what its wheel was built as."""
    return all((root / name).exists() for name in SOURCES)
