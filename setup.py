"""Compiles the hot path to C with mypyc where DISAGG_PROXY_COMPILE=1 asks for it (docs/performance.md).

Otherwise there is nothing here that pyproject.toml does not say. The modules stay ordinary Python: without it they run
as they are, and tests/test_compilable.py holds them to what compiles without changing its meaning.

test_single_machine.sh builds with it too (disagg_machine/compiled) and reads :data:`MYPY` without setuptools.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

MYPY = "mypy[mypyc]==2.4.1"
"""The compiler. Pinned, because native code is only as good as the version that the tests have run."""

_HOT = (
    "admission/*.py",
    "cluster/*.py",
    "cluster/policies/*.py",
    "connectors/*.py",
    "coordinator/*.py",
    "downstream/*.py",
    "http1/*.py",
    "openai/*.py",
    "placement/elastic.py",
    "placement/fit.py",
    "placement/goals.py",
    "placement/pace.py",
    "placement/trust.py",
    "runtime/*.py",
    "server/asgi/request.py",
    "server/fast_path.py",
    "server/request_head.py",
    "telemetry/event_log.py",
    "telemetry/request_record.py",
    "telemetry/request_recorder.py",
    "telemetry/stats.py",
    "telemetry/timeseries.py",
    "upstream/*.py",
    "request_id.py",
)
_AS_THEY_ARE = {"headers.py", "kv_control.py", "shutdown.py", "within.py"}
"""A list with methods cannot be a native class; and what tells KV ports awaits while it handles exceptions."""

# The compiler's own check of types would need every dependency; `mypy` in the tests' command is the one that counts.
_LENIENT = ("--config-file=", "--ignore-missing-imports", "--allow-untyped-calls")


def hot_path(package: Path = Path("disagg_proxy")) -> list[Path]:
    """The modules that every request or token runs through."""
    found = [path for pattern in _HOT for path in sorted(package.glob(pattern))]
    return [path for path in found if path.name != "__init__.py" and path.name not in _AS_THEY_ARE]


def arguments() -> dict[str, Any]:
    """What setup gets on top of pyproject.toml."""
    # Elsewhere than in ./build, whose leftovers setuptools would pack: modules that are gone, or compiled before.
    build = tempfile.mkdtemp(prefix="disagg-proxy-build-")
    atexit.register(shutil.rmtree, build, ignore_errors=True)
    options = {"build": {"build_base": build}}
    if os.environ.get("DISAGG_PROXY_COMPILE") != "1":
        return {"options": options}
    if importlib.util.find_spec("mypyc") is None:
        # The builder installs it and comes again.
        return {"setup_requires": [MYPY], "options": options}
    from mypyc.build import mypycify

    modules = mypycify(
        [*_LENIENT, *map(str, hot_path())], opt_level="3", debug_level="0", target_dir=os.path.join(build, "c")
    )
    return {"ext_modules": modules, "options": options}


if __name__ == "__main__":
    from setuptools import setup

    setup(**arguments())
