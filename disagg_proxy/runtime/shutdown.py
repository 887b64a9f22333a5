"""The last phase of a running proxy, and the time it may take: SHUTDOWN_GRACE, counted once for everything.

The first signal begins it, and the next one ends it at once. Requests that were here whole by then are answered, the
queued ones too; a fifth of the time, at most 5 s, is kept for what the rest leaves on the instances: prefills that run
to their end, and drains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

_FOR_THE_REST = 0.2
_MOST_FOR_THE_REST = 5.0


class OpenExchange(Protocol):
    """Of a client that waits, or reads."""

    def cut_off(self) -> None: ...


class OpenExchanges:
    """Those that are open."""

    def __init__(self) -> None:
        self.open: set[OpenExchange] = set()
        self._none = asyncio.Event()
        self._none.set()

    def begin(self, exchange: OpenExchange) -> None:
        """It is open."""
        self.open.add(exchange)
        self._none.clear()

    def end(self, exchange: OpenExchange) -> None:
        """It is over; harmless the second time."""
        self.open.discard(exchange)
        if not self.open:
            self._none.set()

    async def ended(self) -> None:
        """Until none is open."""
        await self._none.wait()


class Shutdown:
    """Whether the end has begun, and what is left of the time.

    Args:
        grace: seconds in all.
        clock: monotonic seconds.

    Attributes:
        begun: nothing new is taken in.
        hurried: nothing is waited for any more.
        exchanges: what must end first, and can be told to.
    """

    def __init__(self, grace: float, clock: Callable[[], float]) -> None:
        self._grace = grace
        self._clock = clock
        self._end = 0.0
        self.begun = asyncio.Event()
        self.hurried = asyncio.Event()
        self.exchanges = OpenExchanges()

    def begin(self) -> None:
        """The time runs from now on; only the first call counts."""
        if not self.begun.is_set():
            self._end = self._clock() + self._grace
            self.begun.set()

    def hurry(self) -> None:
        """The time is over."""
        self.begin()
        self._end = self._clock()
        self.hurried.set()

    @property
    def left(self) -> float:
        """Seconds until everything must have ended."""
        return max(0.0, self._end - self._clock()) if self.begun.is_set() else self._grace

    @property
    def left_for_requests(self) -> float:
        """Seconds until clients that still wait are cut off."""
        return max(0.0, self.left - min(self._grace * _FOR_THE_REST, _MOST_FOR_THE_REST))

    async def wait(self, work: Coroutine[Any, Any, None], seconds: float) -> None:
        """Until ``work`` is done, at most ``seconds``, and not when in a hurry; then ``work`` is cancelled."""
        await first_of(work, self.hurried.wait(), seconds=seconds)


async def first_of(*works: Coroutine[Any, Any, Any], seconds: float) -> None:
    """Until one of ``works`` is done, at most ``seconds``; the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
