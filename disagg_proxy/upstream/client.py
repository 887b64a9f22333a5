"""HTTP client for the instances: a pool of persistent connections, and the rule for resending on a fresh one.

Socket errors are translated here and in ``connection`` into the tree of ``errors``. Their messages name the leg and
never an address, because clients read them. :class:`Resend` is the only rule for sending a request twice on the same
instance; docs/retry.md has its reasons.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from enum import Enum
from typing import Any, cast

from disagg_proxy.address import Address
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.progress import PendingResponse
from disagg_proxy.errors import EngineDisconnected, EngineUnreachable
from disagg_proxy.http1.head_cache import HeadCache
from disagg_proxy.http1.head_writer import request_line
from disagg_proxy.http1.headers import ResponseHeaders
from disagg_proxy.runtime.write_coalescing import WriteBatch
from disagg_proxy.upstream.connection import Connection
from disagg_proxy.upstream.response import ReadUntil, Response

log = logging.getLogger(__name__)

KEEP_IDLE = 3.0
"""Seconds for which an idle connection is kept. vLLM's server closes idle connections after 5 s (0.9.2 - 0.23,
``vllm/envs.py``, VLLM_HTTP_TIMEOUT_KEEP_ALIVE); a shorter time avoids sending a request into a closing connection."""


class Resend(Enum):
    """Whether a request whose connection closed before its response is sent once more, on a fresh connection."""

    NEVER = 0
    UNSENT = 1
    """Only if the instance cannot have received it: it was not sent completely."""
    REUSED = 2
    """Also if a reused connection closed. The instance may have received the request, and may process it twice."""

    def allows(self, error: EngineDisconnected) -> bool:
        """Whether a request that failed with ``error`` may be sent again."""
        if error.unsent:
            return self is not Resend.NEVER
        return error.reused and self is Resend.REUSED


class Upstream:
    """A connection pool. Create and close it on the event loop that uses it.

    Args:
        connect_timeout: seconds for one connection attempt.
        write_batch: batches the requests of all connections.

    Attributes:
        heads: cache of response heads, shared by all connections.
    """

    def __init__(self, connect_timeout: float, write_batch: WriteBatch) -> None:
        self.connect_timeout = connect_timeout
        self.write_batch = write_batch
        self._loop = asyncio.get_running_loop()
        self.heads: HeadCache[tuple[int, ResponseHeaders]] = HeadCache(ids=False)
        self._idle: dict[str, list[Connection]] = {}
        self._open: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    async def close(self) -> None:
        """Close every connection."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        self._idle.clear()
        for connection in list(self._open):
            connection.close()
        while self._open:
            # Transports report the end in one of the next iterations.
            await asyncio.sleep(0)

    async def request(
        self,
        method: str,
        instance: Instance,
        path: str,
        *,
        headers: bytes = b"",
        body: bytes = b"",
        idle_timeout: float,
        leg: str,
        fresh: bool = False,
        until: ReadUntil = ReadUntil.HEAD,
        resend: Resend = Resend.NEVER,
        resend_body: bytes | None = None,
        pending: PendingResponse | None = None,
    ) -> Response:
        """Send one request and wait for its response, up to ``until``. If cancelled, closes the connection.

        Args:
            headers: header lines, each with its CRLF.
            idle_timeout: seconds that may pass without data from the instance, before and during the body.
            leg: the leg's name for messages, such as "prefill".
            fresh: use a new connection, and do not keep it.
            resend: whether a closed connection is followed by a second, fresh one.
            resend_body: the body of the second request if the first one may have been received; None: the same body.
            pending: fails the response with its error when the instance is found stalled or lost.

        Raises:
            EngineUnreachable: no connection could be established.
            EngineDisconnected: the connection ended before ``until``.
            EngineDeadline: the idle timeout expired, or the error of ``pending``.
        """
        netloc = instance.http.netloc
        connection = None if fresh else self._take(netloc)
        if connection is None:
            connection = await self._connect(instance.http, str(instance), leg, keep=not fresh)
        length = b"content-length: %d\r\n" % len(body) if body or method == "POST" else b""
        head = b"%b%b%b\r\n" % (request_line(method, path, netloc), length, headers)
        response = _send(connection, head, body, idle_timeout, leg, pending)
        try:
            await response.wait_until(until)
            return response
        except EngineDisconnected as error:
            if not resend.allows(error):
                raise
            if resend_body is not None and not error.unsent:
                body = resend_body
        connection = await self._connect(instance.http, str(instance), leg, keep=False)
        head = b"%bcontent-length: %d\r\n%b\r\n" % (request_line(method, path, netloc), len(body), headers)
        response = _send(connection, head, body, idle_timeout, leg, pending)
        await response.wait_until(until)
        return response

    def _take(self, netloc: str) -> Connection | None:
        """The most recently used idle connection, None if there is none."""
        kept = self._idle.get(netloc)
        while kept:
            connection = kept.pop()
            if connection.open and self._loop.time() - connection.idle_since < KEEP_IDLE:
                return connection
            connection.abort()
        return None

    # -- called by connections (``connection.Pool``)

    def opened(self, connection: Connection) -> None:
        """The connection is established."""
        self._open.add(connection)

    def closed(self, connection: Connection) -> None:
        """The connection is closed."""
        self._open.discard(connection)

    def released(self, connection: Connection) -> None:
        """The connection is idle and can carry another request."""
        self._idle.setdefault(connection.name, []).append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(KEEP_IDLE, self._sweep)

    def _sweep(self) -> None:
        """Close connections that have been idle for :data:`KEEP_IDLE` seconds."""
        self._sweeper = None
        oldest = self._loop.time() - KEEP_IDLE
        for netloc, kept in list(self._idle.items()):
            old = 0
            while old < len(kept) and (kept[old].idle_since <= oldest or not kept[old].open):
                kept[old].abort()
                old += 1
            del kept[:old]
            if not kept:
                del self._idle[netloc]
        if self._idle:
            next_one = min(kept[0].idle_since for kept in self._idle.values())
            self._sweeper = self._loop.call_at(next_one + KEEP_IDLE, self._sweep)

    async def _connect(self, address: Address, name: str, leg: str, keep: bool) -> Connection:
        def protocol() -> Any:
            return Connection(address.netloc, keep, self)

        connecting = self._loop.create_task(self._loop.create_connection(protocol, address.host, address.port))
        try:
            # Not wait_for, which before Python 3.12 loses a cancellation that comes together with the connection.
            await asyncio.wait((connecting,), timeout=self.connect_timeout)
            if not connecting.done():
                raise asyncio.TimeoutError
            return cast(Connection, connecting.result()[1])
        except BaseException as error:
            connecting.add_done_callback(_abort_late)
            connecting.cancel()
            if not isinstance(error, (OSError, asyncio.TimeoutError)):
                raise
            log.info("%s: %s on the %s leg: %s", name, type(error).__name__, leg, error)
            raise EngineUnreachable(f"The {leg} instance could not be reached.", refused=_is_refusal(error)) from error


def _send(
    connection: Connection, head: bytes, body: bytes, idle_timeout: float, leg: str, pending: PendingResponse | None
) -> Response:
    """Send a request, unless its instance was found stalled or lost while the connection was established."""
    if pending is None:
        return connection.send(head, body, idle_timeout, leg)
    if pending.error is not None:
        connection.abort()
        raise pending.error
    response = connection.send(head, body, idle_timeout, leg)
    pending.answer = response
    return response


def _abort_late(connecting: asyncio.Task[tuple[asyncio.Transport, Connection]]) -> None:
    """Close a connection that was established after its request was cancelled or has timed out."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result()[0].abort()


def _is_refusal(error: Exception) -> bool:
    """Whether no process listens at the address. For a name with several addresses, asyncio (3.10 - 3.13) raises an
    error without ``errno`` that says so in its text only."""
    number = getattr(error, "errno", None)
    return number == errno.ECONNREFUSED or (number is None and "refused" in str(error))
