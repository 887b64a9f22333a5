"""Compiles the hot path to C with mypyc where DISAGG_PROXY_COMPILE=1 asks for it (docs/performance.md); else there is
nothing here that pyproject.toml does not say. The modules stay ordinary Python: without it they run as they are.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from setuptools import setup

MYPY = "mypy[mypyc]>=1.15"

_HOT = (
    "admission/*.py",
    "cluster/*.py",
    "cluster/policies/*.py",
    "flight/*.py",
    "protocol/*.py",
    "upstream/*.py",
    "observe/record.py",
    "observe/recorder.py",
    "http/direct.py",
    "http/generation.py",
    "http/asked.py",
    "observe/journal.py",
    "observe/meter.py",
    "deadlines.py",
    "launch.py",
    "stats.py",
    "steps.py",
    "stopping.py",
)
_AS_THEY_ARE = {"headers.py"}
"""A list with methods cannot be a native class."""

# The compiler's own check of types would need every dependency; `mypy` in the tests' command is the one that counts.
_LENIENT = ("--config-file=", "--ignore-missing-imports", "--allow-untyped-calls")


def hot_path() -> list[str]:
    """The modules that every request or token runs through."""
    found = [path for pattern in _HOT for path in sorted(Path("disagg_proxy").glob(pattern))]
    return [str(path) for path in found if path.name != "__init__.py" and path.name not in _AS_THEY_ARE]


def arguments() -> dict[str, Any]:
    """What setup gets on top of pyproject.toml."""
    if os.environ.get("DISAGG_PROXY_COMPILE") != "1":
        return {}
    if importlib.util.find_spec("mypyc") is None:
        # The builder installs it and comes again.
        return {"setup_requires": [MYPY]}
    from mypyc.build import mypycify

    return {"ext_modules": mypycify([*_LENIENT, *hot_path()], opt_level="3", debug_level="0")}


setup(**arguments())
