"""What is bound to one HTTP exchange of the application, and ends with it.

If a client leaves before the response has started, Quart (0.22) drops the handler without running the ``finally`` of a
body generator. Resources are therefore bound to the ASGI call, which always ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from disagg_proxy.errors import ProxyError, StreamCut, answer_of, shutting_down
from disagg_proxy.server.asgi.request import REQUEST_ID

log = logging.getLogger(__name__)

_KEY = "disagg_proxy.exchange"

ENDLESS = "disagg_proxy.endless"
"""Key in the ASGI scope of a response without an end of its own, such as a feed; a shutdown need not wait for it."""

ERROR_EVENT = "disagg_proxy.error_event"
"""Key in the ASGI scope of a function that encodes an error as an event, once a stream is sent that may end with it."""

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


class Resource(Protocol):
    """What must be released when its exchange ends."""

    def leave(self) -> None: ...


class ExchangeScopeMiddleware:
    """ASGI middleware that releases the resources of an exchange when it ends in any way."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope[_KEY] = _Exchange()
        try:
            await self._app(scope, receive, send)
        except StreamCut as cut:
            # After a return with an incomplete response, the server closes the connection: the client sees the cut.
            log.warning("An answer was cut off: %s", cut, extra=_log_fields(scope))
            await _announce_cut(scope, send, cut.error)
        except asyncio.CancelledError:
            log.warning(
                "An answer was cut off: the grace time of the shutdown is over (SHUTDOWN_GRACE).",
                extra=_log_fields(scope),
            )
            await _announce_cut(scope, send, shutting_down())
            await _send_unavailable(send)
        finally:
            exchange.leave()


def _log_fields(scope: Any) -> dict[str, str]:
    return {"request_id": scope.get(REQUEST_ID, "")}


async def _announce_cut(scope: Any, send: Any, error: ProxyError) -> None:
    """Send ``error`` as an event before a stream is cut, with STREAM_ERROR_EVENT=1."""
    if ERROR_EVENT not in scope:
        return
    try:
        await send({"type": "http.response.body", "body": scope[ERROR_EVENT](error), "more_body": True})
    except RuntimeError:
        # uvicorn raises it if the response has not begun.
        return


async def _send_unavailable(send: Any) -> None:
    """Send 503, unless the response has begun; then the server closes the connection."""
    status, headers, body = answer_of(shutting_down())
    try:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
    except RuntimeError:
        # uvicorn raises it if the response has begun.
        return


class _Exchange:
    """The resources of one exchange, and the task of its handler."""

    def __init__(self) -> None:
        self.handler: asyncio.Task[Any] | None = None
        self._resources: list[Resource] = []
        self._ended = False

    def add(self, resource: Resource) -> None:
        if self._ended:
            resource.leave()
            raise asyncio.CancelledError
        self._resources.append(resource)

    def leave(self) -> None:
        self._ended = True
        for resource in self._resources:
            resource.leave()
        if self.handler is not None:
            # Quart (0.22) does not cancel it when the ASGI call is cancelled.
            self.handler.cancel()


def cancel_with_exchange(scope: Any) -> None:
    """Cancel the current task when the exchange of ``scope`` ends."""
    scope[_KEY].handler = asyncio.current_task()


def leave_with_exchange(scope: Any, resource: Resource) -> None:
    """Call ``resource.leave()`` when the exchange of ``scope`` ends.

    Raises:
        CancelledError: the exchange has ended.
    """
    scope[_KEY].add(resource)
