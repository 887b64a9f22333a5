"""Generation requests that bypass ASGI: from uvicorn's connection to the coordinator, and decode's bytes from transport
to transport.

The common case only: a body of known length with nothing in front of it on the connection. Everything else, and what is
refused before its body is read, goes through Quart. The rules are the same ones, in the coordinator and ``respond``;
this module has the order of one exchange and the framing of its answer (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import ClassVar, Protocol

from disagg_proxy.coordinator.head import RequestHead
from disagg_proxy.downstream.refusal import ClientResponse
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.downstream.response_stream import ResponseStream
from disagg_proxy.errors import ProxyError, StreamCut, shutting_down
from disagg_proxy.http1.head_writer import header_lines, status_line
from disagg_proxy.http1.headers import Headers
from disagg_proxy.openai.fields import GENERATION
from disagg_proxy.server.asgi.error_responses import error_parts
from disagg_proxy.server.generation import answer_id
from disagg_proxy.services import Services

log = logging.getLogger(__name__)

ROUTE_OF = {route.path.encode(): route for route in GENERATION}
"""By the request's target."""

_NO_BODY = (204, 304)


class ClientProtocol(Protocol):
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


class FastPathRequest:
    """One exchange; stands where uvicorn keeps its ``RequestResponseCycle``, and has what it looks at there.

    Attributes:
        write_framed: writes to the client.
        response_started, response_complete, disconnected, keep_alive, message_event, default_headers: uvicorn's.
    """

    message_event: ClassVar[_Nobody] = _Nobody()
    waiting_for_100_continue: ClassVar[bool] = False

    __slots__ = (
        "_client",
        "_front",
        "_head_of",
        "_pieces",
        "_reply",
        "_services",
        "_stream",
        "default_headers",
        "disconnected",
        "keep_alive",
        "response_complete",
        "response_started",
        "write_framed",
    )

    def __init__(self, client: ClientProtocol, services: Services, head: RequestHead, keep_alive: bool) -> None:
        self._client = client
        self._services = services
        self._head_of = head
        self._pieces: list[bytes] = []
        self._reply = Reply(self)
        self._front = b""  # a head that leaves with the first of its body
        self._stream: ResponseStream | None = None
        self.write_framed: Callable[[bytes], None] = client.transport.write
        self.keep_alive = keep_alive
        self.default_headers: Headers = []
        self.disconnected = self.response_started = self.response_complete = False
        services.shutdown.exchanges.begin(self)

    # -- the request

    def feed(self, piece: bytes) -> None:
        """A part of the body."""
        self._pieces.append(piece)

    def start(self) -> None:
        """The body is complete. Never raises."""
        pieces, self._pieces = self._pieces, []
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._services.coordinator.start(self._head_of, body, self._reply)

    # -- the answer

    def respond(self, outcome: ClientResponse) -> None:
        """Send an answer, or the head of one and its body as it comes."""
        name = answer_id(self._head_of.client_id, self._reply).encode()
        lines = b"%bx-request-id: %b\r\n" % (outcome.headers.lines, name)
        body = outcome.body
        if isinstance(body, bytes):
            self._say(outcome.status, lines, body)
            return
        self.response_started = True
        self._front = self._head(outcome.status, lines) + b"transfer-encoding: chunked\r\n\r\n"
        self._stream = body
        body.pipe_to(self)
        self._send_front()

    def refuse(self, error: ProxyError) -> None:
        """Send an error."""
        status, headers, body = error_parts(error, self._head_of.client_id)
        self._say(status, header_lines(headers), body)

    def _say(self, status: int, lines: bytes, body: bytes) -> None:
        """A whole answer."""
        if self.disconnected:
            self._over()
            return
        self.response_started = True
        head = self._head(status, lines)
        if status in _NO_BODY:
            self.write_framed(head + b"\r\n")
        else:
            self.write_framed(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        self._finish()

    def _head(self, status: int, lines: bytes) -> bytes:
        """All but the framing."""
        close = b"" if self.keep_alive else b"connection: close\r\n"
        return b"%b%b%b%b" % (status_line(status), self._client.date, lines, close)

    # -- what the stream calls

    def write(self, piece: bytes) -> None:
        """The next bytes of the body, as one chunk."""
        self._send(b"%x\r\n%b\r\n" % (len(piece), piece))

    def end(self) -> None:
        """The body came to its end."""
        self._send(b"0\r\n\r\n")
        self._finish()

    def _send(self, data: bytes) -> None:
        front, self._front = self._front, b""
        self.write_framed(front + data if front else data)

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
        if self._stream is not None:
            self._stream.pause()

    def resume(self) -> None:
        """It takes what there is again."""
        if self._stream is not None:
            self._stream.resume()

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
            self.refuse(shutting_down())

    def _finish(self) -> None:
        self.response_complete = True
        self._over()
        if not self.keep_alive:
            self._client.transport.close()
        self._client.on_response_complete()

    def _over(self) -> None:
        """Give everything back; harmless the second time."""
        self._services.shutdown.exchanges.end(self)
        self._reply.leave()
