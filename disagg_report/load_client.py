"""The client of both arms: HTTP/1.1 over kept connections, and the moment at which each token arrives.

As little as possible happens between the kernel and the clock: the moment is taken when the bytes are read, before
they are parsed. All events of one read have the same moment, as they have for any client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from time import perf_counter
from typing import Any

import httptools

IDLE = 3.0
"""Seconds after which a connection that nobody used is not used again: vLLM's server closes it after 5."""


class Broken(Exception):
    """The connection ended, or never came about, before the answer was complete."""


class Answer:
    """What came back.

    Attributes:
        arrivals: for a stream, when each event with a choice arrived (``perf_counter``).
        completion_tokens: as ``usage`` says; 0 without it.
        done: a stream's ``[DONE]`` was seen.
    """

    __slots__ = ("arrivals", "body", "completion_tokens", "done", "on_first", "status")

    def __init__(self, on_first: Callable[[], None] | None = None) -> None:
        self.status = 0
        self.body = bytearray()
        self.arrivals: list[float] = []
        self.completion_tokens = 0
        self.done = False
        self.on_first = on_first

    def json(self) -> Any:
        """The body of an answer that is no stream."""
        return json.loads(bytes(self.body))

    def event(self, event: bytes, moment: float) -> None:
        """Take in one server-sent event."""
        if not event.startswith(b"data: "):
            return
        if event.startswith(b"data: [DONE]"):
            self.done = True
        elif b'"choices":[]' in event or b'"choices": []' in event:
            usage = json.loads(event[6:]).get("usage") or {}
            self.completion_tokens = int(usage.get("completion_tokens", 0))
        else:
            self.arrivals.append(moment)
            if self.on_first is not None:
                self.on_first()
                self.on_first = None


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.used = 0.0
        self.usable = True
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._moment = 0.0

    async def exchange(self, request: bytes, answer: Answer, stream: bool) -> None:
        if self._transport is None:
            raise Broken("the connection was closed")
        self._done = asyncio.get_running_loop().create_future()
        self._answer, self._stream, self._rest = answer, stream, b""
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        try:
            await self._done
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._moment = perf_counter()
        if self._done is None or self._done.done():
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport, self.usable = None, False
        self._fail(f"the connection ended: {exc or 'closed by the other side'}")

    def _fail(self, why: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(Broken(why))

    # -- httptools

    def on_body(self, body: bytes) -> None:
        if not (self._stream and self._parser.get_status_code() == 200):
            self._answer.body += body
            return
        events = (self._rest + body).split(b"\n\n")
        self._rest = events.pop()
        for event in events:
            self._answer.event(event, self._moment)

    def on_message_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        self.usable = self.usable and self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class Client:
    """Connections to one server, as many as are needed at once, each used again."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._host, self._port = host, port
        self._idle: list[_Connection] = []

    async def get(self, path: str) -> Answer:
        """One GET."""
        return await self._send(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode(), Answer(), False)

    async def post(
        self,
        path: str,
        body: bytes,
        request_id: str = "",
        *,
        stream: bool = False,
        on_first: Callable[[], None] | None = None,
    ) -> Answer:
        """One POST of JSON.

        Args:
            stream: read a 200 as a stream of events.
            on_first: called when the first token is there.

        Raises:
            Broken: no complete answer.
        """
        head = [
            f"POST {path} HTTP/1.1", f"Host: {self._host}", "Content-Type: application/json",
            f"Content-Length: {len(body)}", *([f"X-Request-Id: {request_id}"] if request_id else []), "", "",
        ]  # fmt: skip
        return await self._send("\r\n".join(head).encode() + body, Answer(on_first), stream)

    async def _send(self, request: bytes, answer: Answer, stream: bool) -> Answer:
        loop = asyncio.get_running_loop()
        connection: _Connection | None = None
        while self._idle and connection is None:
            last = self._idle.pop()
            if last.usable and loop.time() - last.used < IDLE:
                connection = last
            else:
                last.close()
        if connection is None:
            try:
                _, connection = await loop.create_connection(_Connection, self._host, self._port)
            except OSError as error:
                raise Broken(f"no connection to port {self._port}: {error}") from None
        await connection.exchange(request, answer, stream)
        if connection.usable:
            connection.used = loop.time()
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    def close(self) -> None:
        """Close what is not in use."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
