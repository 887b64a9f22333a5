"""Many waits of one length with one timer. A timer of its own for each request costs more than what it guards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadlines:
    """Calls back ``seconds`` after :meth:`add`, on the running loop.

    Waits have one length, so they end in the order in which they began, and only the oldest needs a timer.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._waits: dict[int | None, tuple[float, Callable[[], None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0

    def add(self, late: Callable[[], None]) -> int:
        """Call ``late`` in time; returns what :meth:`drop` takes."""
        self._last = wait = self._last + 1
        loop = asyncio.get_running_loop()
        due = loop.time() + self.seconds
        self._waits[wait] = (due, late)
        if self._timer is None:
            self._timer = loop.call_at(due, self._ring)
        return wait

    def drop(self, wait: int | None) -> None:
        """Do not call; harmless when it was called, or for None."""
        self._waits.pop(wait, None)

    def __len__(self) -> int:
        return len(self._waits)

    def _ring(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        now = loop.time() + 0.001
        while self._waits:
            wait, (due, late) = next(iter(self._waits.items()))
            if due > now:
                self._timer = loop.call_at(due, self._ring)
                return
            del self._waits[wait]
            try:
                late()
            except Exception as error:
                # The others' time comes all the same.
                loop.call_exception_handler({"message": "A deadline's callback failed", "exception": error})
