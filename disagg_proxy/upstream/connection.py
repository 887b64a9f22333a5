"""One kept connection to one instance: a request out, an answer in, then the next (HTTP/1.1, no pipelining).

llhttp (httptools) reads the answer and takes off its framing, but for small answers whose head it has read before
(``http1/head_cache``) and for the chunks of a stream that come whole (``http1/chunked``). A connection that says
anything unasked, or anything that is not HTTP, is closed.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol, cast

import httptools

from disagg_proxy.errors import EngineDeadline, EngineDisconnected
from disagg_proxy.http1.chunked import are_complete_chunks
from disagg_proxy.http1.head_cache import HeadCache
from disagg_proxy.http1.headers import Headers, ResponseHeaders
from disagg_proxy.runtime.write_coalescing import WriteBatch, WriteCoalescer
from disagg_proxy.upstream.response import Response, closed_early

log = logging.getLogger(__name__)

_MAX_HEAD = 256 * 1024
"""Bytes of an answer's head, and of what comes before a final status."""


_JOINED = 64 * 1024
"""Bytes below which copying a body costs less than a second write."""


class Pool(Protocol):
    """Whom a connection belongs to.

    Attributes:
        heads: of answers that were read before, on any connection.
        outbox: through which requests leave.
    """

    heads: HeadCache[tuple[int, ResponseHeaders]]
    write_batch: WriteBatch

    def came(self, connection: Connection) -> None:
        """It is open."""

    def idle(self, connection: Connection) -> None:
        """It may carry another request."""

    def went(self, connection: Connection) -> None:
        """It is closed."""


class Connection:
    """An ``asyncio.Protocol`` by its methods, not by its class: a compiled one then has its attributes in place.

    Args:
        name: the instance, as host:port.
        keep: whether it may carry another request after this one.

    Attributes:
        idle_since: loop time at which its last answer ended.
    """

    __slots__ = (
        "_answer",
        "_between",
        "_clock",
        "_feed",
        "_framed",
        "_head",
        "_headers",
        "_heads",
        "_heard",
        "_loop",
        "_over",
        "_parser",
        "_paused",
        "_pieces",
        "_pool",
        "_silence",
        "_stuffed",
        "_timer",
        "_transport",
        "_used",
        "_whole",
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
        self._answer: Response | None = None
        self._headers: Headers = []
        self._pieces: list[bytes] = []
        self._whole = 0  # of the pieces, those of a body that is over
        # Called for each piece of a body; the list's own method costs least.
        self.on_body = self._pieces.append
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data
        self._head = 0  # bytes received before the present answer's body
        self._used = False
        self._framed = False  # whether the answer says where it ends
        self._between = False  # the parser stands behind a chunk, and nothing of the next one has come
        self._over = False
        self._paused = False
        self._stuffed = False  # part of the request waits to leave
        self._silence = self._heard = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def open(self) -> bool:
        """Whether a request can be sent on it."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, head: bytes, body: bytes, silence: float, leg: str) -> Response:
        """Begin an exchange.

        Args:
            silence: seconds that may pass without a byte of the answer while it is read.
        """
        assert self._transport is not None and self._answer is None
        answer = self._answer = Response(self, leg, self._used)
        self._used = True
        self._head = 0
        self._over = self._framed = self._between = False
        self._silence, self._heard = silence, self._clock()
        due = self._heard + silence
        if self._timer is None or self._timer.when() > due:
            self._watch(due)
        if len(body) < _JOINED:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        return answer

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are no subclasses of asyncio's.
        self._transport = WriteCoalescer(cast(asyncio.Transport, transport), self._pool.write_batch)
        self._pool.came(self)

    def pause_writing(self) -> None:
        self._stuffed = True

    def resume_writing(self) -> None:
        self._stuffed = False

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            self.abort()
            return
        self._heard = self._clock()
        sink = answer.sink
        if self._between:
            # Tokens of a stream, mostly. The parser need not know of them.
            if sink is not None and are_complete_chunks(data) and sink.feed_chunks(data):
                return
            self._between = False
        fresh = not self._head and not answer.status
        if fresh:
            known = self._heads.get(data)
            if known is not None and known[1] + known[2] == len(data):
                answer.begun(*known[0])
                self._end(answer, data[known[1] :])
                return
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            log.info("%s: its answer on the %s leg is not HTTP/1.1: %s", self.name, answer.leg, error)
            if not self._over:
                self._fail(closed_early(answer.leg, answer.reused))
                return
            self.keep = False
        if not answer.status:
            self._head += len(data)
            if self._head > _MAX_HEAD:
                self._fail(closed_early(answer.leg, answer.reused))
            return
        if self._over:
            if fresh and self.keep and answer.status < 400:
                self._heads.put(data, (answer.status, answer.headers))
            self._end(answer, self._take())
            return
        # Within a chunk's head the data could not end like that.
        self._between = self._between and data.endswith(b"\n\r\n")
        answer.received(self._take())

    def _take(self) -> bytes:
        """What has come of the body."""
        pieces = self._pieces
        if self._over:
            del pieces[self._whole :]
        piece = b"" if not pieces else pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return piece

    def eof_received(self) -> None:
        return None

    def connection_lost(self, error: Exception | None) -> None:
        answer = self._answer
        if answer is not None and answer.status and not self._framed and error is None:
            # The answer's end is the connection's (RFC 9112, 6.3).
            self._answer = None
            answer.ended()
        elif answer is not None:
            waits = self._stuffed or (self._transport is not None and self._transport.batched > 0)
            self._fail(closed_early(answer.leg, answer.reused, unsent=waits and not answer.status))
        self._transport = None
        self._unwatch()
        # It knows this connection, and would keep it.
        self._parser = self._feed = None  # type: ignore[assignment]
        self._pool.went(self)

    # -- the parser's side

    def on_message_begin(self) -> None:
        if self._over:
            # Unasked, right behind the answer; it is no part of it.
            self.keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._headers.append((name, value.rstrip(b" \t")))
        if name in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        headers, self._headers = self._headers, []
        status = self._parser.get_status_code()
        if status < 200 or self._answer is None or self._over:
            return
        if not self._parser.should_keep_alive():
            self.keep = False
        if status in (204, 304):
            self._framed = True
        self._answer.begun(status, ResponseHeaders(headers))

    def on_chunk_complete(self) -> None:
        self._between = True

    def on_message_complete(self) -> None:
        self._headers = []  # trailers, which nobody reads
        if self._answer is not None and self._answer.status and not self._over:
            self._over = True
            self._whole = len(self._pieces)

    # -- ends

    def _end(self, answer: Response, last: bytes) -> None:
        """The answer is whole: the connection is free before its reader goes on, who may need one."""
        self._answer = None
        # vLLM closes the connection after some 400s without saying so.
        if self.keep and answer.status < 400 and self.open and not self._stuffed:
            self.idle_since = self._clock()
            self._pool.idle(self)
        else:
            self.abort()
        answer.ended(last)

    def _fail(self, error: EngineDisconnected | EngineDeadline) -> None:
        answer, self._answer = self._answer, None
        self.abort()
        if answer is not None:
            log.info("%s: %s", self.name, error.message)
            answer.broke(error)

    def close(self) -> None:
        """The pool ends."""
        if self._answer is not None:
            self._fail(closed_early(self._answer.leg, self._answer.reused))
        self.abort()

    def abort(self) -> None:
        """Close at once; the instance sees a reset or an end."""
        self._answer = None
        self._unwatch()
        if self._transport is not None:
            self._transport.abort()

    # -- silence, and whom it counts against

    def pause_reading(self) -> None:
        """Nobody takes what comes."""
        if self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """It is taken again, and the instance has its whole time."""
        if self._transport is not None and self._paused:
            self._paused = False
            self._heard = self._loop.time()
            self._transport.resume_reading()

    def _watch(self, due: float) -> None:
        self._unwatch()
        self._timer = self._loop.call_at(due, self._look)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """The timer is not moved with every byte: it looks when it fires, and is set again if need be."""
        self._timer = None
        answer = self._answer
        if answer is None:
            return
        now = self._loop.time()
        if self._paused:
            self._heard = now
        due = self._heard + self._silence
        if due - now > 0.001:
            self._watch(due)
        else:
            self._fail(EngineDeadline(f"The {answer.leg} instance said nothing within its deadline."))
