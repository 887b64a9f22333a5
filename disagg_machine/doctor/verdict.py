"""What a check says: ok, a warning or an error, and a message that names the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How bad it is. ``doctor`` ends with exit code 1 when there is an error."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of `doctor`.

    Attributes:
        key: of the message, which names the remedy where there is something to mend.
        arguments: what the message is filled with.
    """

    level: Level
    key: str
    arguments: tuple[object, ...] = ()


def ok(key: str, *arguments: object) -> Verdict:
    """Nothing to do."""
    return Verdict(Level.OK, key, arguments)


def warning(key: str, *arguments: object) -> Verdict:
    """It works, with a drawback or a risk."""
    return Verdict(Level.WARNING, key, arguments)


def error(key: str, *arguments: object) -> Verdict:
    """It will not work."""
    return Verdict(Level.ERROR, key, arguments)
