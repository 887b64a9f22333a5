"""Progress output: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import TextIO

_WIDTH = 24
_BAR_EVERY, _LINE_EVERY = 0.1, 10.0


class Progress:
    """Writes to one stream; messages go to separate lines.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._terminal = out.isatty()
        self._label = ""
        self._shown = 0.0
        self._begun = 0.0

    def begin(self, label: str, seconds: float) -> None:
        """Start a rate. ``seconds``: how long its requests are sent."""
        self._label = label
        self._begun = self._clock()
        self._shown = self._begun
        if self._terminal:
            self._bar(0, 0, 0)
        else:
            self._line(f"{label}: requests for {seconds:g} s")

    def update(self, answered: int, failed: int, planned: int) -> None:
        """Show how many of the planned requests are answered or have failed."""
        now = self._clock()
        if now - self._shown < (_BAR_EVERY if self._terminal else _LINE_EVERY) and answered + failed < planned:
            return
        self._shown = now
        if self._terminal:
            self._bar(answered, failed, planned)
        elif answered + failed < planned:
            self._line(f"{self._label}: {self._counts(answered, failed, planned)}")

    def say(self, text: str) -> None:
        """Print a line."""
        if self._terminal:
            self._write("\r\x1b[K")
        self._line(text)

    def _bar(self, answered: int, failed: int, planned: int) -> None:
        share = (answered + failed) / planned if planned else 0.0
        filled = int(share * _WIDTH)
        text = (
            f"{self._label} [{'#' * filled}{'-' * (_WIDTH - filled)}] {self._counts(answered, failed, planned)}"
            f"  {self._clock() - self._begun:.0f} s"
        )
        columns = shutil.get_terminal_size().columns
        self._write(f"\r\x1b[K{text[: max(20, columns - 1)]}")

    @staticmethod
    def _counts(answered: int, failed: int, planned: int) -> str:
        return f"{answered}/{planned or '?'} answered" + (f", {failed} failed" if failed else "")

    def _line(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        # A closed terminal must not end the measurement.
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:
            pass
