"""Ownership at the level of one HTTP exchange.

A client that leaves while the response start is pending makes Quart (0.22) drop the handler without running the
``finally`` of a body generator. What must be given back in every case is therefore tied to the ASGI call itself,
which always ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from disagg_proxy.errors import StreamCut, answer_of, shutting_down

log = logging.getLogger(__name__)

_KEY = "disagg_proxy.flights"

WATCHES = "disagg_proxy.watches"
"""Key in the scope of an exchange whose client only watches: it may be dropped when the proxy stops."""

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


class Owned(Protocol):
    """A flight, or whatever else must be given back."""

    def leave(self) -> None: ...


class ExchangeScopeMiddleware:
    """ASGI wrapper that ends the flights of an exchange when the exchange ends, however it ends."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        owned = scope[_KEY] = _Owned()
        try:
            await self._app(scope, receive, send)
        except StreamCut as cut:
            # Returning with an unfinished response makes the server close the connection: a visible cut.
            log.warning("An answer was cut off: %s", cut)
        except asyncio.CancelledError:
            log.warning("An answer was cut off: the grace time of the shutdown is over (SHUTDOWN_GRACE).")
            await _say_unavailable(send)
        finally:
            owned.leave()


async def _say_unavailable(send: Any) -> None:
    """A 503 for a client that has no answer yet; one that has a part of it sees the connection close."""
    status, headers, body = answer_of(shutting_down())
    try:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
    except RuntimeError:
        # uvicorn's word for a response that has begun.
        return


class _Owned:
    """The flights of one exchange, and the handler that waits for them."""

    def __init__(self) -> None:
        self.handler: asyncio.Task[Any] | None = None
        self._flights: list[Owned] = []
        self._over = False

    def add(self, flight: Owned) -> None:
        if self._over:
            flight.leave()
            raise asyncio.CancelledError
        self._flights.append(flight)

    def leave(self) -> None:
        self._over = True
        for flight in self._flights:
            flight.leave()
        if self.handler is not None:
            # Quart (0.22) lets it run on when the ASGI call is cancelled.
            self.handler.cancel()


def handles(scope: Any) -> None:
    """The present task ends with the exchange of ``scope`` at the latest."""
    scope[_KEY].handler = asyncio.current_task()


def own(scope: Any, flight: Owned) -> None:
    """Make ``flight`` end with the exchange of ``scope``.

    Raises:
        CancelledError: the exchange has ended.
    """
    scope[_KEY].add(flight)
