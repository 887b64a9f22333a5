"""Small files of this package: ``name=value`` lines, ends of logs, logs kept one generation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def read_fields(path: Path) -> dict[str, str]:
    """``name=value`` lines; empty when the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {name: value for name, _, value in (line.partition("=") for line in lines) if name}


def write_fields(path: Path, fields: Mapping[str, object] | Iterable[tuple[str, object]]) -> None:
    """Replace ``path`` at once, so that no reader sees half of it. Only the owner may read it."""
    items = fields.items() if isinstance(fields, Mapping) else fields
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.writelines(f"{name}={value}\n" for name, value in items)
    os.replace(new, path)


def is_own(path: Path) -> bool:
    """Whether ``path`` is there and belongs to this user."""
    try:
        return path.stat().st_uid == os.geteuid()
    except OSError:
        return False


def tail(path: Path, lines: int, limit: int = 1 << 18) -> list[str]:
    """The last lines of a file, of its last ``limit`` bytes; empty when it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            data = file.read()
    except OSError:
        return []
    return data.decode("utf-8", "replace").removesuffix("\n").split("\n")[-lines:] if data else []


def rotate(log: Path) -> None:
    """Keep a log as ``NAME.log.1`` and begin it anew."""
    if log.exists() and log.stat().st_size:
        os.replace(log, log.with_name(log.name + ".1"))
    log.write_bytes(b"")
