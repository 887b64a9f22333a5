"""The project's Python load client: HTTP/1.1 over kept connections, and the time at which each token arrives.

Reports, benchmarks and chaos runs use it; the C client (``bench/proxy/load.c``) is for microseconds. Little happens
between the kernel and the clock: the time is taken when bytes are read, before they are parsed. All events of one read
have the same time, as for any client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httptools

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 3.0
"""A connection that was idle for longer is not reused: vLLM's server closes it after 5 s."""


class Broken(Exception):
    """The connection was closed or could not be opened before the response was complete."""


class Response:
    """A response, complete or as far as it came.

    Subclasses may override :meth:`event` to interpret the events of a stream.

    Args:
        stream: treat the body of a 200 as server-sent events.
        on_first: called at the first token.

    Attributes:
        status: HTTP status, 0 before the head has arrived.
        body: the body, unless it is a stream.
        arrivals: ``perf_counter`` of each event with tokens.
        usage: ``usage`` of the last event that has no tokens.
        error: an error event, or why an event cannot be parsed; "" without one.
        done: the stream's ``[DONE]`` has arrived.
        left: the client has closed the connection before the end, because :meth:`event` returned True.
    """

    def __init__(self, *, stream: bool = False, on_first: Callable[[], None] | None = None) -> None:
        self.stream = stream
        self.on_first = on_first
        self.status = 0
        self.body = bytearray()
        self.arrivals: list[float] = []
        self.usage: Mapping[str, Any] = {}
        self.error = ""
        self.done = False
        self.left = False

    @property
    def completion_tokens(self) -> int:
        """Output tokens according to ``usage``; 0 without it."""
        return int(self.usage.get("completion_tokens", 0))

    def json(self) -> Any:
        """The parsed body. Raises ValueError."""
        return json.loads(bytes(self.body))

    def event(self, event: bytes, arrived: float) -> bool:
        """Handle one server-sent event; True closes the connection now."""
        if event.startswith(b"data: [DONE]"):
            self.done = True
        elif not event.startswith(b"data:"):
            pass
        elif b'"choices":[{' in event or b'"choices": [{' in event:
            self.arrivals.append(arrived)
            if self.on_first is not None:
                self.on_first()
                self.on_first = None
        else:
            try:
                found = json.loads(event[5:])
                self.usage = found.get("usage") or self.usage
                self.error = str(found.get("error") or self.error)
            except (ValueError, AttributeError) as error:
                self.error = f"{type(error).__name__}: {error}"
        return False


R = TypeVar("R", bound=Response)


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.used = 0.0
        self.usable = True
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._read_at = 0.0

    async def exchange(self, request: bytes, response: Response) -> None:
        if self._transport is None:
            raise Broken("the connection was closed")
        self._done = asyncio.get_running_loop().create_future()
        self._response, self._partial_event = response, b""
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

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        if not self.usable:
            self._transport.abort()  # type: ignore[union-attr]

    def data_received(self, data: bytes) -> None:
        self._read_at = perf_counter()
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
        self._fail(f"the connection closed early: {exc or 'closed by the other side'}")

    def _fail(self, reason: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(Broken(reason))

    def _complete(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    # httptools

    def on_headers_complete(self) -> None:
        self._response.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        response = self._response
        if not (response.stream and response.status == 200):
            response.body += body
            return
        *events, self._partial_event = (self._partial_event + body).split(b"\n\n")
        for event in events:
            if not response.left and response.event(event, self._read_at):
                response.left = True
                self._complete()
                self.close()

    def on_message_complete(self) -> None:
        self.usable = self.usable and self._parser.should_keep_alive()
        self._complete()


class LoadClient:
    """Connections to one server: as many as there are requests at once, each reused.

    Args:
        url: ``http(s)://host:port``, with a path prefix if there is one.
        headers: sent with every request.
        reuse: False opens a connection for every request.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None, *, reuse: bool = True) -> None:
        parts = urlsplit(url)
        self._host, self._tls = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._head = _lines({"Host": parts.netloc, **(headers or {})})
        self._reuse = reuse
        self._idle: list[_Connection] = []

    async def get(self, path: str) -> Response:
        """Send a GET. Raises Broken."""
        request = f"GET {self._prefix}{path} HTTP/1.1\r\n{self._head}\r\n".encode()
        return await self._send(request, Response())

    async def post(
        self,
        path: str,
        body: bytes,
        response: R,
        headers: Mapping[str, str] | None = None,
        *,
        content_length: int | None = None,
    ) -> R:
        """Send a POST of JSON and return ``response`` when it is complete.

        Args:
            content_length: above the length of ``body``, the request stays incomplete until the caller is cancelled.

        Raises:
            Broken: the response is not complete; ``response`` has what arrived.
        """
        length = len(body) if content_length is None else content_length
        head = _lines({"Content-Type": "application/json", "Content-Length": str(length), **(headers or {})})
        request = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}{head}\r\n".encode() + body
        return await self._send(request, response)

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _send(self, request: bytes, response: R) -> R:
        connection = self._idle_connection() or await self._connect()
        await connection.exchange(request, response)
        if connection.usable and self._reuse:
            connection.used = perf_counter()
            self._idle.append(connection)
        else:
            connection.close()
        return response

    def _idle_connection(self) -> _Connection | None:
        while self._idle:
            last = self._idle.pop()
            if last.usable and perf_counter() - last.used < IDLE_SECONDS:
                return last
            last.close()
        return None

    async def _connect(self) -> _Connection:
        connection, loop = _Connection(), asyncio.get_running_loop()
        opening = asyncio.ensure_future(
            loop.create_connection(lambda: connection, self._host, self._port, ssl=self._tls or None)
        )
        try:
            await asyncio.wait({opening}, timeout=CONNECT_SECONDS)
        except asyncio.CancelledError:
            opening.cancel()
            connection.close()
            raise
        where = f"{self._host}:{self._port}"
        if opening.cancel():
            raise Broken(f"cannot connect to {where} within {CONNECT_SECONDS:g} s")
        if error := opening.exception():
            raise Broken(f"cannot connect to {where}: {error}")
        return connection


def _lines(headers: Mapping[str, str]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())
