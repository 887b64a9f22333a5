"""What the user sees on stderr: messages, colours on a terminal, a progress line. Data goes to stdout.

Plain lines where stderr is no terminal. Nothing here fails when the terminal is gone, so that a clean-up goes on.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import TextIO

from disagg_machine import files
from disagg_machine.messages import text

RED, GREEN, YELLOW, BOLD, OFF = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[1m", "\x1b[0m"


class _Progress:
    """The progress line that is shown now."""

    shown = False
    last = ""
    at = 0


class Program:
    """What the user calls this program; it stands before error messages."""

    name = "test_single_machine.sh"


def is_terminal(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal; False when it is closed."""
    try:
        return stream.isatty()
    except ValueError:
        return False


def coloured(line: str, *codes: str, stream: TextIO | None = None) -> str:
    """``line`` in a colour where ``stream`` (default: stderr) is a terminal that wants colours."""
    stream = sys.stderr if stream is None else stream
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") in ("", "dumb") or not is_terminal(sys.stderr)
    if plain or not is_terminal(stream):
        return line
    return "".join(codes) + line + OFF


def _write(words: str) -> None:
    try:
        sys.stderr.write(words)
        sys.stderr.flush()
    except (OSError, ValueError):
        return


def out(line: str = "") -> None:
    """One line of data on stdout, at once."""
    print(line, flush=True)


def emit(line: str) -> None:
    """One line on stderr."""
    progress_clear()
    _write(line + "\n")


def say(key: str, *arguments: object) -> None:
    """A message."""
    emit(text(key, *arguments))


def good(key: str, *arguments: object) -> None:
    """A success."""
    emit(coloured(text(key, *arguments), GREEN))


def warn(key: str, *arguments: object) -> None:
    """A warning."""
    emit(coloured(text(key, *arguments), YELLOW))


def complain(key: str, *arguments: object) -> None:
    """An error."""
    emit(coloured(f"{Program.name}: {text(key, *arguments)}", RED))


def loud(*lines: str) -> None:
    """A box that cannot be overlooked."""
    bar = "*" * 60
    for line in (bar, *(f"*** {line}" for line in lines), bar):
        emit(coloured(line, YELLOW, BOLD))


def plain_line(line: str) -> str:
    """Text of another program, safe to show: control characters become blanks."""
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in line)


def show_log_tail(path: Path, lines: int = 15) -> None:
    """The end of a log, indented; nothing when it is empty or not there."""
    found = files.tail(path, lines)
    if found:
        say("log_tail", lines, path)
    for line in found:
        emit("    " + plain_line(line))


def _columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def progress(what: str, elapsed: int, log: Path | None = None) -> None:
    """One line that is overwritten on a terminal; elsewhere a line when ``what`` changes and every ten seconds.

    Args:
        what: what is waited for.
        elapsed: seconds so far.
        log: its last line is shown behind.
    """
    last = files.tail(log, 1) if log else []
    line = text("waiting_for", what, elapsed) + (f" | {plain_line(last[0])}" if last else "")
    if is_terminal(sys.stderr):
        width = max(20, shutil.get_terminal_size().columns - 1)
        while _columns(line) > width:
            line = line[: len(line) - max(1, (_columns(line) - width) // 2)]
        _write(f"\r\x1b[K{line}")
        _Progress.shown = True
    elif what != _Progress.last or elapsed >= _Progress.at + 10:
        _write(line + "\n")
        _Progress.at = elapsed
    _Progress.last = what


def progress_clear() -> None:
    """Remove the progress line."""
    if _Progress.shown:
        _write("\r\x1b[K")
    _Progress.shown = False
