"""Prints the packages of a requirements file that this Python lacks or has too old, separated by spaces.

Knows lines of the form ``name[extra]>=version; python_version < "3.11"``, which is all that requirements-proxy.txt
uses; the packages are not imported. Works with the standard library alone.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

_LINE = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*(?:>=\s*([0-9.]+))?")

_OLDER_PYTHON = re.compile(r"""python_version\s*<\s*["']([0-9.]+)["']""")


def numbers(version: str) -> tuple[int, ...]:
    """The leading numeric parts of a version: 1.26.0rc1 is (1, 26, 0)."""
    parts: list[int] = []
    for part in version.split("."):
        digits = re.match(r"\d+", part)
        if not digits:
            break
        parts.append(int(digits.group()))
        if digits.group() != part:
            break
    return tuple(parts)


def missing(requirements: str) -> list[str]:
    """Names that are not installed, and ``name>=version`` for those that are older."""
    lacking: list[str] = []
    for line in requirements.splitlines():
        text, _, marker = line.split("#", 1)[0].strip().partition(";")
        found = _LINE.match(text)
        if not text or not found:
            continue
        older = _OLDER_PYTHON.fullmatch(marker.strip())
        if older and sys.version_info[:2] >= numbers(older.group(1)):
            continue
        name, least = found.group(1), found.group(2)
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            lacking.append(name)
            continue
        if least and numbers(installed) < numbers(least):
            lacking.append(f"{name}>={least}")
    return lacking


if __name__ == "__main__":
    print(" ".join(missing(Path(sys.argv[1]).read_text(encoding="utf-8"))))
