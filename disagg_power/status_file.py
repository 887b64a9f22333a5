"""What the holder of the lease has set, and why: a JSON file in RUN_DIR."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NAME = "power.status"
"""The file in RUN_DIR."""

SET, DEFAULT, FAILED = "set", "default", "failed"
"""States: clocks are set; they are the default ones, ``why`` says why; nothing was set."""


@dataclass(frozen=True, slots=True)
class Status:
    """What is set.

    Attributes:
        why: why clocks are the default ones, or nothing was set; empty while they are set.
        kind: of a failure: ``permission``, ``refused``, ``device`` or ``gone``.
        clocks_mhz: cap of the SM clock by role, None for the default.
        notes: what differs from what was wanted, one sentence each.
        since: Unix time of this state.
    """

    pid: int
    state: str
    why: str = ""
    kind: str = ""
    governor: str = "off"
    clocks_mhz: dict[str, int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    since: float = 0.0


def write(path: Path, status: Status) -> None:
    """Replace the file at once."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(asdict(status)), encoding="utf-8")
    os.replace(new, path)


def read(path: Path) -> Status | None:
    """None where there is none, or it cannot be understood."""
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        return Status(**{**value, "notes": tuple(value["notes"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
