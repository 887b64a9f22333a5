"""One answer of an instance while it comes: head, pieces of the body, end; read whole, or poured on as it arrives.

Whoever waits says how much is enough to go on, so that it is woken once. What arrives together stays together.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from disagg_proxy.errors import EngineDeadline, EngineDisconnected, EngineError
from disagg_proxy.http1.headers import ResponseHeaders
from disagg_proxy.runtime.inline_coroutine import Event, InlineCoroutine

log = logging.getLogger(__name__)

_READ_AHEAD = 256 * 1024
"""Bytes of a body that are held for somebody who has not asked for it yet, or only for its beginning."""


_NO_HEADERS = ResponseHeaders()


class ReadUntil(IntEnum):
    """How much of an answer must be there."""

    NOTHING = 0
    HEAD = 1
    """Status and headers."""
    BEGUN = 2
    """The first bytes of the body, or its end."""
    WHOLE = 3


class CompleteResponse(NamedTuple):
    """An answer that was read to its end."""

    status: int
    headers: ResponseHeaders
    body: bytes


class Sink(Protocol):
    """Where a body is poured."""

    def feed(self, piece: bytes) -> None:
        """The next bytes, never none."""

    def feed_chunks(self, chunks: bytes) -> bool:
        """The next bytes as chunks of HTTP/1.1 with their framing, each of whole lines; False, with nothing taken, when
        they must come without it."""

    def end(self) -> None:
        """The body came to its end."""

    def broke(self, error: EngineError | EngineDeadline) -> None:
        """It did not, and nothing more comes."""


class FlowControl(Protocol):
    """The connection under an answer."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def abort(self) -> None: ...


class _TaskEvent:
    """An :class:`Event` for a reader that is a task."""

    __slots__ = ("_future",)

    def __init__(self) -> None:
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def __await__(self) -> Generator[Any, None, None]:
        return self._future.__await__()


class Response:
    """Fed by its connection, read by one reader.

    Args:
        leg: word for messages, such as "prefill".
        reused: whether the connection had carried another request before.

    Attributes:
        status, headers: from :attr:`ReadUntil.HEAD` on.
        sink: where the body is poured, while it comes.
    """

    __slots__ = (
        "_carrier",
        "_enough",
        "_error",
        "_have",
        "_held",
        "_paused",
        "_pieces",
        "sink",
        "_waiter",
        "headers",
        "leg",
        "reused",
        "status",
    )

    def __init__(self, carrier: FlowControl, leg: str, reused: bool) -> None:
        self._carrier: FlowControl | None = carrier
        self.leg = leg
        self.reused = reused
        self.status = 0
        self.headers = _NO_HEADERS
        self._have = ReadUntil.NOTHING
        self._enough = ReadUntil.NOTHING
        self._pieces: list[bytes] = []
        self._held = 0
        self._paused = False
        self.sink: Sink | None = None
        self._error: EngineError | EngineDeadline | None = None
        self._waiter: Event | _TaskEvent | None = None

    # -- the connection's side

    def begun(self, status: int, headers: ResponseHeaders) -> None:
        """Status and headers have come."""
        self.status = status
        self.headers = headers
        self._have = ReadUntil.HEAD

    def received(self, piece: bytes) -> None:
        """What has come in one go, and the answer goes on; maybe nothing of the body."""
        sink = self.sink
        if sink is not None:
            if piece:
                sink.feed(piece)
            return
        if piece:
            self._pieces.append(piece)
            self._held += len(piece)
            self._have = ReadUntil.BEGUN
        if self._waiter is not None and self._have >= self._enough:
            self._wake()
        elif self._held > _READ_AHEAD and self._enough is not ReadUntil.WHOLE and self._carrier is not None:
            self._paused = True
            self._carrier.pause_reading()

    def ended(self, last: bytes = b"") -> None:
        """The last of the body has come."""
        self._carrier = None
        self._have = ReadUntil.WHOLE
        sink = self.sink
        if sink is not None:
            self.sink = None
            if last:
                sink.feed(last)
            sink.end()
            return
        if last:
            self._pieces.append(last)
        if self._waiter is not None:
            self._wake()

    def broke(self, error: EngineError | EngineDeadline) -> None:
        """The connection ended before the answer did."""
        if self._have is ReadUntil.WHOLE or self._error is not None:
            return
        self._carrier = None
        self._error = error
        sink, self.sink = self.sink, None
        if sink is not None:
            sink.broke(error)
        elif self._waiter is not None:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None:
            self._waiter.set()

    # -- the reader's side

    async def until(self, enough: ReadUntil) -> None:
        """Wait until so much is there. Cancelled, it closes the connection.

        Raises:
            EngineDisconnected: the connection broke before.
            EngineDeadline: nothing came for too long.
        """
        if self._have < enough and self._error is None:
            self._enough = enough
            self._go_on()
            event: Event | _TaskEvent = Event() if InlineCoroutine.current is not None else _TaskEvent()
            self._waiter = event
            try:
                await event
            except asyncio.CancelledError:
                self.close()
                raise
            finally:
                self._waiter = None
        if self._have < enough and self._error is not None:
            raise self._error

    def read(self) -> CompleteResponse:
        """What is there, once it is all that was waited for."""
        return CompleteResponse(self.status, self.headers, self._take())

    async def whole(self) -> CompleteResponse:
        """All of it. Raises as :meth:`until` does."""
        await self.until(ReadUntil.WHOLE)
        return self.read()

    def pour(self, sink: Sink) -> None:
        """From now on everything goes to ``sink``: what is held at once, the rest when it comes."""
        piece = self._take()
        if self._have is not ReadUntil.WHOLE and self._error is None:
            self.sink = sink
        # Before the sink gets anything: it may pause at once.
        self._go_on()
        if piece:
            sink.feed(piece)
        if self.sink is not None:
            return
        if self._have is ReadUntil.WHOLE:
            sink.end()
        elif self._error is not None:
            sink.broke(self._error)

    def pause(self) -> None:
        """The sink is full. What its instance says meanwhile waits in the sockets."""
        if self._carrier is not None and not self._paused:
            self._paused = True
            self._carrier.pause_reading()

    def resume(self) -> None:
        """The sink has room again."""
        self._go_on()

    def close(self) -> None:
        """Give up the rest; the instance sees the connection close and aborts its work. Harmless when read."""
        if self._carrier is not None:
            self.fail(closed_early(self.leg, self.reused))

    def fail(self, error: EngineError | EngineDeadline) -> None:
        """End the answer with ``error``, raised by :meth:`until` or reported to the sink, and close its connection."""
        if self._carrier is not None:
            self._carrier.abort()
        self.broke(error)

    def _go_on(self) -> None:
        if self._paused:
            self._paused = False
            if self._carrier is not None:
                self._carrier.resume_reading()

    def _take(self) -> bytes:
        pieces = self._pieces
        self._pieces, self._held = [], 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def closed_early(leg: str, reused: bool, unsent: bool = False) -> EngineDisconnected:
    """The connection ended before the answer did."""
    message = f"The {leg} instance closed the connection without an answer."
    return EngineDisconnected(message, unsent=unsent, reused=reused)
