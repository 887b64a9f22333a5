"""Failures counted by reason and logged in summary lines, so that many events make few lines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

_MAX_REASONS = 8
"""Distinct reasons in one line; others are summed up, because peers choose some of the texts."""
_MAX_REASON_LENGTH = 100
_OTHER = "other reasons"


class Tally:
    """Logs at the first event, then at most once per ``period`` seconds what was counted since.

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
        """Count one event per reason and log if the period is over. Call it without reasons to log what is pending."""
        for reason in reasons:
            reason = reason[:_MAX_REASON_LENGTH]
            known = reason in self._pending or len(self._pending) < _MAX_REASONS
            self._pending[reason if known else _OTHER] += 1
            self.total += 1
        if self._pending and (now := self._clock()) >= self._next:
            self._next = now + self._period
            reasons_text = "; ".join(f"{count} x {reason}" for reason, count in self._pending.most_common())
            self._write(f"{self._what}: {self._pending.total()} ({reasons_text}), {self.total} since the start")
            self._pending.clear()
