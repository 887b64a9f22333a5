"""Many timeouts of one length behind one event loop timer; one timer per request is measurably slower."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class FixedTimeouts:
    """Calls back ``seconds`` after :meth:`add`, on the running loop.

    All timeouts have one length, so they expire in the order in which they were added, and only the oldest needs a
    timer.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._pending: dict[int | None, tuple[float, Callable[[], None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0
        # Looked up once: Python before 3.12 makes a system call for it.
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, expired: Callable[[], None]) -> int:
        """Call ``expired`` after ``seconds``. Returns the key for :meth:`drop`."""
        self._last = key = self._last + 1
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        due = loop.time() + self.seconds
        self._pending[key] = (due, expired)
        if self._timer is None:
            self._timer = loop.call_at(due, self._expire)
        return key

    def drop(self, key: int | None) -> None:
        """Remove a timeout. No effect after it has expired, or for None."""
        self._pending.pop(key, None)

    def __len__(self) -> int:
        return len(self._pending)

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        now = loop.time() + 0.001
        while self._pending:
            key, (due, expired) = next(iter(self._pending.items()))
            if due > now:
                self._timer = loop.call_at(due, self._expire)
                return
            del self._pending[key]
            try:
                expired()
            except Exception as error:
                # A failing callback must not delay the others.
                loop.call_exception_handler({"message": "A timeout's callback failed", "exception": error})
