"""The time budget of a shutdown: SHUTDOWN_GRACE, counted once for all phases.

The first signal starts it, the second one expires it. Requests received completely by then are served, queued ones
included. A fifth of the time, at most 5 s, is reserved for the work that the others leave on the instances: prefills
that run to their end, and KV releases. docs/server.md has the order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

_RESERVED_FRACTION = 0.2
_MAX_RESERVED = 5.0
"""Of the grace time, in seconds, for background work after the last request."""


class OpenExchange(Protocol):
    """An HTTP exchange whose client waits for its response or reads it."""

    def cut_off(self) -> None:
        """The grace time is over: end the exchange now."""


class OpenExchanges:
    """The set of open exchanges."""

    def __init__(self) -> None:
        self.open: set[OpenExchange] = set()
        self._none = asyncio.Event()
        self._none.set()

    def begin(self, exchange: OpenExchange) -> None:
        """Add an exchange."""
        self.open.add(exchange)
        self._none.clear()

    def end(self, exchange: OpenExchange) -> None:
        """Remove an exchange; further calls have no effect."""
        self.open.discard(exchange)
        if not self.open:
            self._none.set()

    async def ended(self) -> None:
        """Wait until no exchange is open."""
        await self._none.wait()


class Shutdown:
    """Whether the proxy is shutting down, and how much time remains.

    Args:
        grace: seconds for all phases together.
        clock: monotonic seconds.

    Attributes:
        grace: the same; a change has no effect on a shutdown that has begun.
        begun: set when the shutdown has begun; new requests are refused from then on.
        expired: set when the grace time was ended early.
        exchanges: the open exchanges, which end first.
    """

    def __init__(self, grace: float, clock: Callable[[], float]) -> None:
        self.grace = grace
        self._clock = clock
        self._end = 0.0
        self.begun = asyncio.Event()
        self.expired = asyncio.Event()
        self.exchanges = OpenExchanges()

    def begin(self) -> None:
        """Start the grace time; further calls have no effect."""
        if not self.begun.is_set():
            self._end = self._clock() + self.grace
            self.begun.set()

    def expire(self) -> None:
        """End the grace time now."""
        self.begin()
        self._end = self._clock()
        self.expired.set()

    @property
    def remaining(self) -> float:
        """Seconds until everything must have ended; the full grace time before the shutdown."""
        return max(0.0, self._end - self._clock()) if self.begun.is_set() else self.grace

    @property
    def remaining_for_requests(self) -> float:
        """Seconds until clients that still wait are cut off."""
        return max(0.0, self.remaining - min(self.grace * _RESERVED_FRACTION, _MAX_RESERVED))

    async def wait(self, work: Coroutine[Any, Any, None], seconds: float) -> None:
        """Run ``work`` for at most ``seconds`` or until the grace time expires early; then cancel it."""
        await first_of(work, self.expired.wait(), seconds=seconds)


async def first_of(*works: Coroutine[Any, Any, Any], seconds: float) -> None:
    """Run ``works`` until one of them ends, for at most ``seconds``; then cancel the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
