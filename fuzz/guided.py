"""The process that libFuzzer runs in: ``python -m fuzz.guided TARGET COUNTS [libFuzzer options] CORPUS``.

Started by :func:`fuzz.pure.run_guided`. The counts go to a file now and then, since libFuzzer lets nobody have the
last word.
"""

from __future__ import annotations

import atexit
import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import atheris

_WRITE_EVERY = 5000


def main() -> None:
    """Never returns."""
    name, counts, *options = sys.argv[1:]
    with atheris.instrument_imports(include=["disagg_proxy", "uvicorn.protocols"]):
        target = importlib.import_module(f"fuzz.{name}")
    labels: Counter[str] = Counter()
    done = 0

    def one(data: bytes) -> None:
        nonlocal done
        done += 1
        try:
            labels[target.check(data)] += 1
        finally:
            if done % _WRITE_EVERY == 0:
                write()

    def write() -> None:
        Path(counts).write_text(json.dumps({"executions": done, "labels": labels}))

    atheris.Setup([sys.argv[0], *options], one)
    atexit.register(write)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
