"""The event loop of asynchronous tests. Its clock does not count the stalls of an overloaded host.

Proxy, engines and clients of a test share one process. When the host stops that process for a second, the timeouts of
all of them would expire before any of them can react, which no deployment with separate processes shows.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import time

BUSY = 0.01
"""Seconds that callbacks count at most, from one reading of the clock to the next."""

_WAIT = 0.05
_LATE = 0.005
"""Seconds that a wait may be late and is still counted in full."""


class _Clock:
    """Seconds that never grow by more than the caller allows for what has happened since the last reading."""

    def __init__(self) -> None:
        self._seen = self.now = time.monotonic()

    def read(self, at_most: float = BUSY) -> float:
        seen = time.monotonic()
        self.now += min(seen - self._seen, at_most)
        self._seen = seen
        return self.now


class _Selector(selectors.DefaultSelector):
    """Waits in short steps, so that a stall within a wait is found."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        end = math.inf if timeout is None else self._clock.read() + timeout
        while True:
            wait = min(_WAIT, max(0.0, end - self._clock.read()))
            events = super().select(wait)
            if self._clock.read(wait + _LATE) >= end or events:
                return events


class StallFreeLoop(asyncio.SelectorEventLoop):
    """A selector event loop on a clock that stands for the progress of its process."""

    def __init__(self) -> None:
        self._steady = _Clock()
        super().__init__(_Selector(self._steady))

    def time(self) -> float:
        return self._steady.read()

    def advance(self, seconds: float) -> None:
        """Let all timers see ``seconds`` more, as after a stall of the event loop."""
        self._steady.now += seconds
