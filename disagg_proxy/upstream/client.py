"""One HTTP exchange with one instance, over a pool of kept connections, with a typed outcome.

Everything the sockets raise is translated here and in ``connection`` into the project's error tree. Messages name the
leg, never the address: clients read them. :class:`Resend` is the one rule for sending a request a second time over a
fresh connection; docs/retry.md has its reasons.
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
"""Seconds an idle connection is kept. vLLM's server closes them after 5 s (0.9.2 - 0.23, ``vllm/envs.py``,
VLLM_HTTP_TIMEOUT_KEEP_ALIVE); staying below means that a request is not sent into a closing connection."""


class Resend(Enum):
    """When a request whose connection closed before the answer is sent once more, over a fresh connection."""

    NEVER = 0
    UNSENT = 1
    """Only when the instance cannot have received it: it had not left completely."""
    REUSED = 2
    """Also after a kept connection closed: the instance may have received it, and may process it twice."""

    def allows(self, error: EngineDisconnected) -> bool:
        """Whether a request that failed with ``error`` may be sent again."""
        if error.unsent:
            return self is not Resend.NEVER
        return error.reused and self is Resend.REUSED


class Upstream:
    """The pool. Create and close it on the event loop that uses it.

    Args:
        connect_timeout: seconds for one connection attempt.
        outbox: through which requests leave.
    """

    def __init__(self, connect_timeout: float, write_batch: WriteBatch) -> None:
        self._connect_timeout = connect_timeout
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
            # Transports say goodbye in one of the loop's next turns.
            await asyncio.sleep(0)

    async def request(
        self,
        method: str,
        instance: Instance,
        path: str,
        *,
        headers: bytes = b"",
        body: bytes = b"",
        silence: float,
        leg: str,
        fresh: bool = False,
        enough: ReadUntil = ReadUntil.HEAD,
        resend: Resend = Resend.NEVER,
        resend_body: bytes | None = None,
        pending: PendingResponse | None = None,
    ) -> Response:
        """Send one request and wait for as much of the answer as is ``enough``. Cancelled, it closes the connection.

        Args:
            headers: whole lines, each with its end.
            silence: seconds that may pass without a byte from the instance, before and within the body.
            leg: word for messages, such as "prefill".
            fresh: use a connection of its own instead of a kept one.
            resend: when a closed connection is made up for by a second, fresh one.
            resend_body: the body of the second request where the first one may have been received.
            pending: fails the answer with its error when the instance is found stalled or lost.

        Raises:
            EngineUnreachable: no connection.
            EngineDisconnected: the connection ended before so much of the answer.
            EngineDeadline: silence, or the error of ``pending``.
        """
        netloc = instance.http.netloc
        connection = None if fresh else self._take(netloc)
        if connection is None:
            connection = await self._dial(instance.http, str(instance), leg, keep=not fresh)
        length = b"content-length: %d\r\n" % len(body) if body or method == "POST" else b""
        head = b"%b%b%b\r\n" % (request_line(method, path, netloc), length, headers)
        answer = _exchange(connection, head, body, silence, leg, pending)
        try:
            await answer.until(enough)
            return answer
        except EngineDisconnected as error:
            if not resend.allows(error):
                raise
            if resend_body is not None and not error.unsent:
                body = resend_body
        connection = await self._dial(instance.http, str(instance), leg, keep=False)
        head = b"%bcontent-length: %d\r\n%b\r\n" % (request_line(method, path, netloc), len(body), headers)
        answer = _exchange(connection, head, body, silence, leg, pending)
        await answer.until(enough)
        return answer

    def _take(self, netloc: str) -> Connection | None:
        """The kept connection that was used last."""
        kept = self._idle.get(netloc)
        while kept:
            connection = kept.pop()
            if connection.open and self._loop.time() - connection.idle_since < KEEP_IDLE:
                return connection
            connection.abort()
        return None

    # -- what connections tell

    def came(self, connection: Connection) -> None:
        """It is open."""
        self._open.add(connection)

    def went(self, connection: Connection) -> None:
        """It is closed."""
        self._open.discard(connection)

    def idle(self, connection: Connection) -> None:
        """It may carry another request."""
        self._idle.setdefault(connection.name, []).append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(KEEP_IDLE, self._sweep)

    def _sweep(self) -> None:
        """Close what has been idle for too long."""
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

    async def _dial(self, address: Address, name: str, leg: str, keep: bool) -> Connection:
        def fresh() -> Any:
            return Connection(address.netloc, keep, self)

        dialing = self._loop.create_task(self._loop.create_connection(fresh, address.host, address.port))
        try:
            # Not wait_for, which before Python 3.12 loses a cancellation that comes together with the connection.
            await asyncio.wait((dialing,), timeout=self._connect_timeout)
            if not dialing.done():
                raise asyncio.TimeoutError
            return cast(Connection, dialing.result()[1])
        except BaseException as error:
            dialing.add_done_callback(_hang_up)
            dialing.cancel()
            if not isinstance(error, (OSError, asyncio.TimeoutError)):
                raise
            log.info("%s: %s on the %s leg: %s", name, type(error).__name__, leg, error)
            raise EngineUnreachable(f"The {leg} instance could not be reached.", refused=_is_refusal(error)) from error


def _exchange(
    connection: Connection, head: bytes, body: bytes, silence: float, leg: str, pending: PendingResponse | None
) -> Response:
    """Send a request, unless its instance was given up while the connection was made."""
    if pending is None:
        return connection.send(head, body, silence, leg)
    if pending.error is not None:
        connection.abort()
        raise pending.error
    answer = connection.send(head, body, silence, leg)
    pending.answer = answer
    return answer


def _hang_up(dialing: asyncio.Task[tuple[asyncio.Transport, Connection]]) -> None:
    """Nobody waits for it any more."""
    if not dialing.cancelled() and dialing.exception() is None:
        dialing.result()[0].abort()


def _is_refusal(error: Exception) -> bool:
    """Whether nobody listens there. For a name with several addresses asyncio only says so in words."""
    number = getattr(error, "errno", None)
    return number == errno.ECONNREFUSED or (number is None and "refused" in str(error))
