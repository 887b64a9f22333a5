"""Counts of what went wrong by reason, logged in one line for many events."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

_REASONS = 8
"""Different reasons in one line; further ones are summed up, since peers choose some of the texts."""
_REASON_LENGTH = 100
_OTHER = "other reasons"


class Tally:
    """Logs at the first event, then at most once per ``period`` seconds, what has been counted since.

    Args:
        what: the subject of the line.
        write: writes one line.
    """

    def __init__(
        self, what: str, write: Callable[[str], None], period: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._write, self._period, self._clock = what, write, period, clock
        self._pending: Counter[str] = Counter()
        self._next = float("-inf")
        self.total = 0

    def add(self, reasons: Iterable[str]) -> None:
        """Counts one event per reason, and logs if it is time to. Call it with none to log what is pending."""
        for reason in reasons:
            reason = reason[:_REASON_LENGTH]
            known = reason in self._pending or len(self._pending) < _REASONS
            self._pending[reason if known else _OTHER] += 1
            self.total += 1
        if self._pending and (now := self._clock()) >= self._next:
            self._next = now + self._period
            said = "; ".join(f"{count} x {reason}" for reason, count in self._pending.most_common())
            self._write(f"{self._what}: {self._pending.total()} ({said}), {self.total} since the start")
            self._pending.clear()
