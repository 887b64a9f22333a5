"""Generation requests past the ASGI machinery: from uvicorn's connection to a flight, and decode's bytes from transport
to transport.

The common case only: a body of known length with nothing in front of it on the connection. Everything else, and what is
refused before its body is read, goes through Quart. The rules are the same ones: ``generation``, ``guard``, ``respond``
and the flights; this module holds the order of one exchange and the framing of its answer (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import lru_cache
from http import HTTPStatus
from typing import Any, ClassVar, Protocol

from disagg_proxy.errors import ProxyError, StreamCut, shutting_down
from disagg_proxy.flight.outcome import Outcome
from disagg_proxy.flight.relay import Relay
from disagg_proxy.http.generation import Asked, answer_id, begin
from disagg_proxy.http.respond import error_parts, from_bug
from disagg_proxy.launch import CARRIERS, Carrier
from disagg_proxy.protocol.fields import GENERATION
from disagg_proxy.protocol.headers import Headers, lines_of
from disagg_proxy.services import Services

log = logging.getLogger(__name__)

ROUTE_OF = {route.path.encode(): route for route in GENERATION}
"""By the request's target."""

_NO_BODY = (204, 304)


class Client(Protocol):
    """The connection that a request came on."""

    transport: asyncio.Transport

    @property
    def date(self) -> bytes:
        """What the server says of itself in every answer, as lines."""

    def on_response_complete(self) -> None:
        """The answer is whole."""


class _Nobody:
    """Where uvicorn wakes the reader of a body."""

    def set(self) -> None: ...


class Direct:
    """One exchange; stands where uvicorn keeps its ``RequestResponseCycle``, and has what it looks at there.

    Attributes:
        pass_on: writes to the client.
        response_started, response_complete, disconnected, keep_alive, message_event, default_headers: uvicorn's.
    """

    message_event: ClassVar[_Nobody] = _Nobody()
    waiting_for_100_continue: ClassVar[bool] = False

    __slots__ = (
        "_asked",
        "_client",
        "_flight",
        "_front",
        "_pieces",
        "_relay",
        "_services",
        "_waiting",
        "default_headers",
        "disconnected",
        "keep_alive",
        "pass_on",
        "response_complete",
        "response_started",
    )

    def __init__(self, client: Client, services: Services, asked: Asked, keep_alive: bool) -> None:
        self._client = client
        self._services = services
        self._asked = asked
        self._pieces: list[bytes] = []
        self._flight: Carrier | None = None
        self._front = b""  # a head that leaves with the first of its body
        self._relay: Relay | None = None
        self.pass_on: Callable[[bytes], None] = client.transport.write
        self._waiting: asyncio.Task[None] | None = None
        self.keep_alive = keep_alive
        self.default_headers: Headers = []
        self.disconnected = self.response_started = self.response_complete = False
        services.stopping.exchanges.begin(self)

    # -- the request

    def feed(self, piece: bytes) -> None:
        """A part of the body."""
        self._pieces.append(piece)

    def start(self) -> None:
        """The body is whole. Never raises."""
        pieces, self._pieces = self._pieces, []
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        try:
            begun = begin(self._services, self._asked, body)
        except ProxyError as error:
            self._refuse(error)
        except Exception as bug:
            self._refuse(from_bug(bug))
        else:
            if isinstance(begun, CARRIERS):
                self._fly(begun)
            else:
                self._waiting = asyncio.get_running_loop().create_task(self._queue(begun))

    async def _queue(self, begun: Coroutine[Any, Any, Carrier]) -> None:
        try:
            flight = await begun
        except ProxyError as error:
            self._waiting = None
            self._refuse(error)
        except Exception as bug:
            self._waiting = None
            self._refuse(from_bug(bug))
        else:
            self._waiting = None
            self._fly(flight)

    def _fly(self, flight: Carrier) -> None:
        self._flight = flight
        if self.disconnected:
            self._over()
            return
        flight.start(self._told)

    # -- the answer

    def _told(self, what: Outcome | ProxyError) -> None:
        if isinstance(what, ProxyError):
            self._refuse(what)
            return
        assert self._flight is not None
        name = answer_id(self._asked.client_id, self._flight).encode()
        lines = b"%bx-request-id: %b\r\n" % (what.headers.lines, name)
        if isinstance(what.body, bytes):
            self._say(what.status, lines, what.body)
            return
        self.response_started = True
        self._front = self._head(what.status, lines) + b"transfer-encoding: chunked\r\n\r\n"
        self._relay = what.body
        what.body.pour(self)
        self._send_front()

    def _refuse(self, error: ProxyError) -> None:
        status, headers, body = error_parts(error, self._asked.client_id)
        self._say(status, lines_of(headers), body)

    def _say(self, status: int, lines: bytes, body: bytes) -> None:
        """A whole answer."""
        if self.disconnected:
            self._over()
            return
        self.response_started = True
        head = self._head(status, lines)
        if status in _NO_BODY:
            self.pass_on(head + b"\r\n")
        else:
            self.pass_on(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        self._finish()

    def _head(self, status: int, lines: bytes) -> bytes:
        """All but the framing."""
        close = b"" if self.keep_alive else b"connection: close\r\n"
        return b"%b%b%b%b" % (_status_line(status), self._client.date, lines, close)

    # -- what the relay calls

    def write(self, piece: bytes) -> None:
        """The next bytes of the body, as one chunk."""
        self._send(b"%x\r\n%b\r\n" % (len(piece), piece))

    def end(self) -> None:
        """The body came to its end."""
        self._send(b"0\r\n\r\n")
        self._finish()

    def _send(self, data: bytes) -> None:
        front, self._front = self._front, b""
        self.pass_on(front + data if front else data)

    def _send_front(self) -> None:
        if self._front:
            self._send(b"")

    def cut(self, cause: StreamCut) -> None:
        """It did not: the connection closes without the last chunk, which the client can see."""
        log.warning("An answer was cut off: %s", cause)
        self._send_front()
        self._client.transport.close()
        self._over()

    # -- ends

    def pause(self) -> None:
        """The client takes nothing."""
        if self._relay is not None:
            self._relay.pause()

    def resume(self) -> None:
        """It takes what there is again."""
        if self._relay is not None:
            self._relay.resume()

    def left(self) -> None:
        """The client's connection is gone, or nothing more is read of it."""
        self.disconnected = True
        self._over()

    def cut_off(self) -> None:
        """The time is over: 503 for a client without an answer, a closed connection for one that has a part of it."""
        log.warning("An answer was cut off: the grace time of the shutdown is over (SHUTDOWN_GRACE).")
        self.keep_alive = False
        if self.response_started:
            self._client.transport.abort()
            self.left()
        else:
            self._refuse(shutting_down())

    def _finish(self) -> None:
        self.response_complete = True
        self._over()
        if not self.keep_alive:
            self._client.transport.close()
        self._client.on_response_complete()

    def _over(self) -> None:
        """Give everything back; harmless the second time."""
        self._services.stopping.exchanges.end(self)
        if self._flight is not None:
            self._flight.leave()
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            # Not before its first step, in which it begins to wait.
            asyncio.get_running_loop().call_soon(waiting.cancel)


@lru_cache(maxsize=128)
def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()
