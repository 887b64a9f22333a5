"""Generation requests that bypass ASGI: from the client's connection to the coordinator, and the response back.

Only the common case: a body of known length, with no other request in front of it on the connection. Everything else,
and whatever is refused before its body is read, goes through Quart. The rules are the same, in the coordinator and in
``asgi/error_responses``; this module owns the order of one exchange and the framing of its response
(docs/performance.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import ClassVar, Protocol

from disagg_proxy.coordinator.coordinator import RequestHead
from disagg_proxy.downstream.refusal import ClientResponse
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.downstream.response_stream import ResponseStream
from disagg_proxy.errors import ProxyError, StreamCut, shutting_down
from disagg_proxy.http1.head_writer import header_lines, status_line
from disagg_proxy.http1.headers import Headers, request_id_headers
from disagg_proxy.openai.error_answer import stream_error
from disagg_proxy.openai.fields import GENERATION, MESSAGES
from disagg_proxy.server.asgi.error_responses import error_parts
from disagg_proxy.services import Services

log = logging.getLogger(__name__)

ROUTE_OF = {route.path.encode(): route for route in GENERATION}
"""Generation routes by path. A query string is ignored, as in vLLM: Anthropic's clients add ``?beta=true``."""

_WITHOUT_BODY = (204, 304)

# nginx would buffer the events.
_STREAMED = b"x-accel-buffering: no\r\ntransfer-encoding: chunked\r\n\r\n"


class ClientProtocol(Protocol):
    """The connection of a request, as the request uses it."""

    transport: asyncio.Transport

    @property
    def default_header_lines(self) -> bytes:
        """Header lines of every response, such as Date."""

    def on_response_complete(self) -> None:
        """The response has been written completely."""


class _NoEvent:
    """Stands for the event that uvicorn sets for the reader of a body."""

    def set(self) -> None: ...


class FastPathRequest:
    """One exchange, in place of uvicorn's ``RequestResponseCycle``, with the attributes of it that uvicorn uses.

    Attributes:
        write_framed: writes bytes with their HTTP/1.1 framing to the client.
        response_started, response_complete, disconnected, keep_alive, message_event, default_headers: uvicorn's.
    """

    message_event: ClassVar[_NoEvent] = _NoEvent()
    waiting_for_100_continue: ClassVar[bool] = False

    __slots__ = (
        "_chunks",
        "_client",
        "_pending_head",
        "_reply",
        "_request_head",
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
        self._request_head = head
        self._chunks: list[bytes] = []
        self._reply = Reply(self, head.client_id)
        self._pending_head = b""  # a response head that leaves with the first chunk of its body
        self._stream: ResponseStream | None = None
        self.write_framed: Callable[[bytes], None] = client.transport.write
        self.keep_alive = keep_alive
        self.default_headers: Headers = []
        self.disconnected = self.response_started = self.response_complete = False
        services.shutdown.exchanges.begin(self)

    # -- the request

    def on_body(self, data: bytes) -> None:
        """The next bytes of the body."""
        self._chunks.append(data)

    def start(self) -> None:
        """Serve the request: its body is complete. Never raises."""
        chunks, self._chunks = self._chunks, []
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._services.coordinator.start(self._request_head, body, self._reply)

    # -- the response (``downstream.reply.Downstream``)

    def respond(self, outcome: ClientResponse) -> None:
        """Send a complete response, or a head and then the body as it arrives."""
        lines = self._lines(outcome.headers.lines)
        body = outcome.body
        if isinstance(body, bytes):
            self._send_response(outcome.status, lines, body)
            return
        self.response_started = True
        self._pending_head = self._response_head(outcome.status, lines) + _STREAMED
        self._stream = body
        body.pipe_to(self)
        self._flush_head()

    def refuse(self, error: ProxyError) -> None:
        """Send an error."""
        status, headers, body = error_parts(error, self._reply.request_id)
        self._send_response(status, self._lines(header_lines(headers)), body)

    def _lines(self, lines: bytes) -> bytes:
        """``lines`` with the request id, the limits of the client's key, and the engines if SERVED_BY_HEADER=1."""
        request_id = self._reply.request_id.encode()
        lines = b"%bx-request-id: %b\r\n" % (lines, request_id)
        if self._request_head.route is MESSAGES:
            lines = b"%brequest-id: %b\r\n" % (lines, request_id)
        if self._reply.headers is not None:
            lines += header_lines(self._reply.headers)
        if self._services.config.served_by_header and self._reply.served_by:
            lines = b"%bx-served-by: %b\r\n" % (lines, self._reply.served_by.encode())
        return lines

    @property
    def request_id_headers(self) -> Headers:
        """The request id as headers, for an error that the connection sends in place of this exchange."""
        return request_id_headers(self._reply.request_id, self._request_head.route.path.encode())

    def _send_response(self, status: int, lines: bytes, body: bytes) -> None:
        """Write a complete response."""
        if self.disconnected:
            self._release()
            return
        self.response_started = True
        head = self._response_head(status, lines)
        if status in _WITHOUT_BODY:
            self.write_framed(head + b"\r\n")
        else:
            self.write_framed(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        self._finish()

    def _response_head(self, status: int, lines: bytes) -> bytes:
        """The response head without Content-Length or Transfer-Encoding, and without the final empty line."""
        close = b"" if self.keep_alive else b"connection: close\r\n"
        return b"%b%b%b%b" % (status_line(status), self._client.default_header_lines, lines, close)

    # -- called by the stream (``downstream.response_stream.StreamSink``)

    def write(self, data: bytes) -> None:
        """Write one chunk."""
        self._send(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        """Write the terminating chunk."""
        self._send(b"0\r\n\r\n")
        self._finish()

    def _send(self, data: bytes) -> None:
        front, self._pending_head = self._pending_head, b""
        self.write_framed(front + data if front else data)

    def _flush_head(self) -> None:
        if self._pending_head:
            self._send(b"")

    def cut(self, cause: StreamCut) -> None:
        """Abort the response: close without the terminating chunk, so that the client can detect the truncation."""
        log.warning("An answer was cut off: %s", cause, extra={"request_id": self._reply.request_id})
        self._announce_cut(cause.error)
        self._flush_head()
        self._client.transport.close()
        self._release()

    def _announce_cut(self, error: ProxyError) -> None:
        """Send ``error`` as an event, with STREAM_ERROR_EVENT=1. Only complete events have been sent before."""
        if self._services.config.stream_error_event:
            self.write(stream_error(self._request_head.route, error))

    # -- ends

    def pause(self) -> None:
        """The client does not read: stop reading from decode."""
        if self._stream is not None:
            self._stream.pause()

    def resume(self) -> None:
        """The client reads again."""
        if self._stream is not None:
            self._stream.resume()

    def on_disconnect(self) -> None:
        """The client has left, or will not get its response."""
        self.disconnected = True
        self._release()

    def cut_off(self) -> None:
        """The grace time is over: send 503, or close the connection if the response has begun."""
        log.warning(
            "An answer was cut off: the grace time of the shutdown is over (SHUTDOWN_GRACE).",
            extra={"request_id": self._reply.request_id},
        )
        self.keep_alive = False
        if not self.response_started:
            self.refuse(shutting_down())
            return
        if self._services.config.stream_error_event:
            self._announce_cut(shutting_down())
            self._client.transport.close()
        else:
            self._client.transport.abort()
        self.on_disconnect()

    def _finish(self) -> None:
        self.response_complete = True
        self._release()
        if not self.keep_alive:
            self._client.transport.close()
        self._client.on_response_complete()

    def _release(self) -> None:
        """Release what the exchange holds. Further calls have no effect."""
        self._services.shutdown.exchanges.end(self)
        self._reply.leave()
