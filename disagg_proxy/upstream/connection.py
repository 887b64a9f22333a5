"""One persistent connection to one instance: a request, its response, then the next (HTTP/1.1, no pipelining).

llhttp (httptools) parses responses and removes their framing. Two common cases skip it: small responses whose head is
in the cache (``http1/head_cache``), and complete chunks of a stream (``http1/chunked``). A connection that receives
data without a request, or anything that is not HTTP, is closed.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol, cast

import httptools

from disagg_proxy.errors import EngineDeadline, EngineDisconnected
from disagg_proxy.http1.chunked import are_complete_chunks
from disagg_proxy.http1.head_cache import HeadCache
from disagg_proxy.http1.headers import Headers, ResponseHeaders, shared_response_headers
from disagg_proxy.runtime.write_coalescing import WriteBatch, WriteCoalescer
from disagg_proxy.upstream.response import Response, disconnected

log = logging.getLogger(__name__)

_MAX_HEAD_BYTES = 256 * 1024
"""Limit of a response's head, interim (1xx) responses included."""

_MAX_JOINED_BYTES = 64 * 1024
"""Bodies below this size are copied behind the head, which costs less than a second write."""


class Pool(Protocol):
    """The pool that a connection belongs to.

    Attributes:
        heads: cache of response heads, shared by all connections.
        write_batch: batches the requests of all connections.
    """

    heads: HeadCache[tuple[int, ResponseHeaders]]
    write_batch: WriteBatch

    def opened(self, connection: Connection) -> None:
        """The connection is established."""

    def released(self, connection: Connection) -> None:
        """The connection is idle and can carry another request."""

    def closed(self, connection: Connection) -> None:
        """The connection is closed."""


class Connection:
    """Implements ``asyncio.Protocol`` without inheriting from it: compiled, its attributes are then struct fields.

    Args:
        name: the instance, as host:port.
        keep: whether it may carry another request after the first.

    Attributes:
        idle_since: loop time at which its last response ended.
    """

    __slots__ = (
        "_at_chunk_boundary",
        "_chunks",
        "_clock",
        "_complete_chunks",
        "_feed",
        "_framed",
        "_head_bytes",
        "_headers",
        "_heads",
        "_idle_timeout",
        "_last_data",
        "_loop",
        "_message_complete",
        "_parser",
        "_paused",
        "_pool",
        "_response",
        "_timer",
        "_transport",
        "_used",
        "_write_paused",
        "idle_since",
        "keep",
        "name",
        "on_body",
    )

    def __init__(self, name: str, keep: bool, pool: Pool) -> None:
        self.name = name
        self.keep = keep
        self.idle_since = 0.0
        self._pool = pool
        self._heads = pool.heads
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._transport: WriteCoalescer | None = None
        self._response: Response | None = None
        self._headers: Headers = []
        self._chunks: list[bytes] = []
        self._complete_chunks = 0  # of _chunks, those that belong to a message that is complete
        # The parser's callback for body data; the list's own method is the cheapest one.
        self.on_body = self._chunks.append
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data
        self._head_bytes = 0  # received of the current response before its status
        self._used = False
        self._framed = False  # the response has a length of its own; otherwise it ends with the connection
        self._at_chunk_boundary = False  # the parser is between two chunks
        self._message_complete = False
        self._paused = False
        self._write_paused = False  # the socket has not accepted all of the request
        self._idle_timeout = self._last_data = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, head: bytes, body: bytes, idle_timeout: float, leg: str) -> Response:
        """Send a request.

        Args:
            idle_timeout: seconds that may pass between two reads of the response, not counting time while paused.
        """
        assert self._response is None
        response = self._response = Response(self, leg, self._used)
        if self._transport is None:
            # Closed by the instance between its establishment and the next iteration of the sender.
            self._fail(disconnected(leg, self._used, unsent=True))
            return response
        self._used = True
        self._head_bytes = 0
        self._message_complete = self._framed = self._at_chunk_boundary = False
        self._idle_timeout, self._last_data = idle_timeout, self._clock()
        due = self._last_data + idle_timeout
        if self._timer is None or self._timer.when() > due:
            self._start_timer(due)
        if len(body) < _MAX_JOINED_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        return response

    # -- called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = WriteCoalescer(cast(asyncio.Transport, transport), self._pool.write_batch)
        self._pool.opened(self)

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:
            self.abort()
            return
        self._last_data = self._clock()
        sink = response.sink
        if self._at_chunk_boundary:
            # Mostly tokens of a stream, which can bypass the parser.
            if sink is not None and are_complete_chunks(data) and sink.feed_chunks(data):
                return
            self._at_chunk_boundary = False
        first_read = not self._head_bytes and not response.status
        if first_read:
            known = self._heads.get(data)
            if known is not None and known[1] + known[2] == len(data):
                response.on_head(*known[0])
                self._end(response, data[known[1] :])
                return
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            log.info("%s: invalid HTTP/1.1 response on the %s leg: %s", self.name, response.leg, error)
            if not self._message_complete:
                self._fail(disconnected(response.leg, response.reused))
                return
            self.keep = False
        if not response.status:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._fail(disconnected(response.leg, response.reused))
            return
        if self._message_complete:
            if first_read and self.keep and response.status < 400:
                self._heads.put(data, (response.status, response.headers))
            self._end(response, self._take())
            return
        # Data cannot end like this inside a chunk's size line.
        self._at_chunk_boundary = self._at_chunk_boundary and data.endswith(b"\n\r\n")
        response.on_data(self._take())

    def _take(self) -> bytes:
        """The body data that the parser has produced."""
        chunks = self._chunks
        if self._message_complete:
            del chunks[self._complete_chunks :]
        data = b"" if not chunks else chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        return data

    def eof_received(self) -> None:
        return None

    def connection_lost(self, error: Exception | None) -> None:
        response = self._response
        if response is not None and response.status and not self._framed and error is None:
            # The response ends with the connection (RFC 9112, 6.3).
            self._response = None
            response.on_end()
        elif response is not None:
            unsent = self._write_paused or (self._transport is not None and self._transport.batched > 0)
            self._fail(disconnected(response.leg, response.reused, unsent=unsent and not response.status))
        self._transport = None
        self._stop_timer()
        # The parser refers to this connection: break the reference cycle.
        self._parser = self._feed = None  # type: ignore[assignment]
        self._pool.closed(self)

    # -- called by the parser

    def on_message_begin(self) -> None:
        if self._message_complete:
            # Data behind the response that belongs to no request; it is ignored.
            self.keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._headers.append((name, value.rstrip(b" \t")))
        if name in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        headers, self._headers = self._headers, []
        status = self._parser.get_status_code()
        if status < 200 or self._response is None or self._message_complete:
            return
        if not self._parser.should_keep_alive():
            self.keep = False
        if status in (204, 304):
            self._framed = True
        self._response.on_head(status, shared_response_headers(tuple(headers)))

    def on_chunk_complete(self) -> None:
        self._at_chunk_boundary = True

    def on_message_complete(self) -> None:
        self._headers = []  # trailers, which are ignored
        if self._response is not None and self._response.status and not self._message_complete:
            self._message_complete = True
            self._complete_chunks = len(self._chunks)

    # -- ends

    def _end(self, response: Response, data: bytes) -> None:
        """The response is complete. Releases the connection before its reader resumes, which may need one."""
        self._response = None
        # vLLM closes the connection after some 400s without announcing it.
        if self.keep and response.status < 400 and self.open and not self._write_paused:
            self.idle_since = self._clock()
            self._pool.released(self)
        else:
            self.abort()
        response.on_end(data)

    def _fail(self, error: EngineDisconnected | EngineDeadline) -> None:
        response, self._response = self._response, None
        self.abort()
        if response is not None:
            log.info("%s: %s", self.name, error.message)
            response.on_error(error)

    def close(self) -> None:
        """Close, and fail a running response."""
        if self._response is not None:
            self._fail(disconnected(self._response.leg, self._response.reused))
        self.abort()

    def abort(self) -> None:
        """Close at once, without notifying a running response."""
        self._response = None
        self._stop_timer()
        if self._transport is not None:
            self._transport.abort()

    # -- backpressure and the idle timeout

    def pause_reading(self) -> None:
        """Stop reading; the idle timeout is suspended."""
        if self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again; the idle timeout starts anew."""
        if self._transport is not None and self._paused:
            self._paused = False
            self._last_data = self._loop.time()
            self._transport.resume_reading()

    def _start_timer(self, due: float) -> None:
        self._stop_timer()
        self._timer = self._loop.call_at(due, self._check_idle)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_idle(self) -> None:
        """Fail an idle response. The timer is not moved with each read; it is restarted here while data arrives."""
        self._timer = None
        response = self._response
        if response is None:
            return
        now = self._loop.time()
        if self._paused:
            self._last_data = now
        due = self._last_data + self._idle_timeout
        if due - now > 0.001:
            self._start_timer(due)
        else:
            self._fail(EngineDeadline(f"The {response.leg} instance sent nothing for {self._idle_timeout:g} s."))
