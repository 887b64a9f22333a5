"""One response of an instance while it arrives: read until a chosen point, read completely, or piped to a sink.

The reader states how much it needs, so that it is resumed once. Data that arrives together is passed on together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from disagg_proxy.errors import EngineDeadline, EngineDisconnected, EngineError
from disagg_proxy.http1.headers import ResponseHeaders
from disagg_proxy.runtime.inline_coroutine import RUNNING, Event

_READ_AHEAD = 256 * 1024
"""Bytes of a body that are buffered before it is read or piped; then the connection is paused."""

_NO_HEADERS = ResponseHeaders()


class ReadUntil(IntEnum):
    """How much of a response has arrived, or is needed."""

    NOTHING = 0
    HEAD = 1
    """Status and headers."""
    BODY_STARTED = 2
    """The first bytes of the body, or its end."""
    COMPLETE = 3


class CompleteResponse(NamedTuple):
    """A response that was read to its end."""

    status: int
    headers: ResponseHeaders
    body: bytes


class Sink(Protocol):
    """Receives a body as it arrives. Either :meth:`end` or :meth:`fail` is called last, once."""

    def feed(self, data: bytes) -> None:
        """The next bytes, never empty."""

    def feed_chunks(self, chunks: bytes) -> bool:
        """The next bytes as complete HTTP/1.1 chunks with their framing, each of complete lines.

        Returns:
            False if the sink takes none of it and needs the bytes without framing.
        """

    def end(self) -> None:
        """The body is complete."""

    def fail(self, error: EngineError | EngineDeadline) -> None:
        """The body ended early."""


class FlowControl(Protocol):
    """The connection of a response, as the response controls it."""

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
    """Filled by its connection, read by one reader.

    Args:
        leg: the leg's name for messages, such as "prefill".
        reused: whether the connection has carried another request before.

    Attributes:
        status, headers: valid from :attr:`ReadUntil.HEAD` on; the status is 0 before.
        sink: receives the body while it is piped.
    """

    __slots__ = (
        "_arrived",
        "_buffered",
        "_chunks",
        "_connection",
        "_error",
        "_needed",
        "_paused",
        "_waiter",
        "headers",
        "leg",
        "reused",
        "sink",
        "status",
    )

    def __init__(self, connection: FlowControl, leg: str, reused: bool) -> None:
        self._connection: FlowControl | None = connection  # None after the end
        self.leg = leg
        self.reused = reused
        self.status = 0
        self.headers = _NO_HEADERS
        self._arrived = ReadUntil.NOTHING
        self._needed = ReadUntil.NOTHING
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self.sink: Sink | None = None
        self._error: EngineError | EngineDeadline | None = None
        self._waiter: Event | _TaskEvent | None = None

    # -- called by the connection

    def on_head(self, status: int, headers: ResponseHeaders) -> None:
        """Status and headers have arrived."""
        self.status = status
        self.headers = headers
        self._arrived = ReadUntil.HEAD

    def on_data(self, data: bytes) -> None:
        """Everything of the body from one read of the socket, possibly nothing; more follows."""
        sink = self.sink
        if sink is not None:
            if data:
                sink.feed(data)
            return
        if data:
            self._chunks.append(data)
            self._buffered += len(data)
            self._arrived = ReadUntil.BODY_STARTED
        if self._waiter is not None and self._arrived >= self._needed:
            self._wake()
        elif self._buffered > _READ_AHEAD and self._needed is not ReadUntil.COMPLETE and self._connection is not None:
            self._paused = True
            self._connection.pause_reading()

    def on_end(self, data: bytes = b"") -> None:
        """The response is complete; ``data`` is the rest of its body."""
        self._connection = None
        self._arrived = ReadUntil.COMPLETE
        sink = self.sink
        if sink is not None:
            self.sink = None
            if data:
                sink.feed(data)
            sink.end()
            return
        if data:
            self._chunks.append(data)
        if self._waiter is not None:
            self._wake()

    def on_error(self, error: EngineError | EngineDeadline) -> None:
        """The connection ended before the response was complete."""
        if self._arrived is ReadUntil.COMPLETE or self._error is not None:
            return
        self._connection = None
        self._error = error
        sink, self.sink = self.sink, None
        if sink is not None:
            sink.fail(error)
        elif self._waiter is not None:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None:
            self._waiter.set()

    # -- called by the reader

    async def wait_until(self, needed: ReadUntil) -> None:
        """Wait until ``needed`` has arrived. If cancelled, closes the connection.

        Raises:
            EngineDisconnected: the connection ended before.
            EngineDeadline: the idle timeout expired before, or the instance was found stalled.
        """
        if self._arrived < needed and self._error is None:
            self._needed = needed
            self._resume_reading()
            event: Event | _TaskEvent = Event() if RUNNING.coroutine is not None else _TaskEvent()
            self._waiter = event
            try:
                await event
            except asyncio.CancelledError:
                self.close()
                raise
            finally:
                self._waiter = None
        if self._arrived < needed and self._error is not None:
            raise self._error

    async def wait_for_body(self, enough: Callable[[bytes], bool]) -> None:
        """Wait until what has arrived of the body is ``enough``, or complete. Raises as :meth:`wait_until` does."""
        while self._arrived is not ReadUntil.COMPLETE and not enough(b"".join(self._chunks)):
            # The next bytes are awaited as the first were.
            self._arrived = ReadUntil.HEAD
            await self.wait_until(ReadUntil.BODY_STARTED)

    @property
    def beginning(self) -> bytes:
        """The first bytes of the body, after :attr:`ReadUntil.BODY_STARTED` and before anything has taken them."""
        return self._chunks[0] if self._chunks else b""

    def read(self) -> CompleteResponse:
        """The response, after :meth:`wait_until` has returned for :attr:`ReadUntil.COMPLETE`."""
        return CompleteResponse(self.status, self.headers, self._take())

    async def read_all(self) -> CompleteResponse:
        """Wait for the complete response. Raises as :meth:`wait_until` does."""
        await self.wait_until(ReadUntil.COMPLETE)
        return self.read()

    def pipe_to(self, sink: Sink) -> None:
        """Pass the body to ``sink``: what is buffered now, the rest as it arrives."""
        data = self._take()
        if self._arrived is not ReadUntil.COMPLETE and self._error is None:
            self.sink = sink
        # Before the sink gets anything, because it may pause at once.
        self._resume_reading()
        if data:
            sink.feed(data)
        if self.sink is not None:
            return
        if self._arrived is ReadUntil.COMPLETE:
            sink.end()
        elif self._error is not None:
            sink.fail(self._error)

    def pause(self) -> None:
        """Stop reading from the instance: the sink is full."""
        if self._connection is not None and not self._paused:
            self._paused = True
            self._connection.pause_reading()

    def resume(self) -> None:
        """Read from the instance again."""
        self._resume_reading()

    def close(self) -> None:
        """Close the connection, so that the instance aborts the request. No effect once the response is complete."""
        if self._connection is not None:
            self.fail(disconnected(self.leg, self.reused))

    def fail(self, error: EngineError | EngineDeadline) -> None:
        """Close the connection and end the response with ``error``: :meth:`wait_until` raises it, the sink gets it."""
        if self._connection is not None:
            self._connection.abort()
        self.on_error(error)

    def _resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            if self._connection is not None:
                self._connection.resume_reading()

    def _take(self) -> bytes:
        chunks = self._chunks
        self._chunks, self._buffered = [], 0
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def disconnected(leg: str, reused: bool, unsent: bool = False) -> EngineDisconnected:
    """The error of a connection that ended before its response was complete."""
    message = f"The {leg} instance closed the connection without an answer."
    return EngineDisconnected(message, unsent=unsent, reused=reused)
