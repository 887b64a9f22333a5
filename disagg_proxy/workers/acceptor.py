"""Taking clients' connections from the one socket that all workers share.

One socket rather than one for each worker (SO_REUSEPORT): what waits in it is nobody's yet, so a worker that dies loses
no connection that it has not taken, and one that is stopped takes none. The kernel wakes every idle worker for a
connection; those that have more clients than another let that one go first for a moment, which keeps the workers even
also when many connections come at once and stay.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

log = logging.getLogger(__name__)

_WAY = 0.002
"""Seconds for which a worker with fewer clients is let go first."""

_PAUSE = 1.0
"""Seconds after the system has refused a connection for want of files or memory."""


class Acceptor:
    """Looks like an ``asyncio.Server`` to uvicorn.

    Args:
        listening: bound and listening; stays the caller's.
        protocol: makes what handles one connection.
        ahead: whether another worker has fewer clients.
    """

    def __init__(
        self, listening: socket.socket, protocol: Callable[[], asyncio.Protocol], ahead: Callable[[], bool]
    ) -> None:
        self._listening = listening
        self._protocol = protocol
        self._ahead = ahead
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[object]] = set()
        self._closed = False
        listening.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Take no more; the socket stays as it is."""
        self._closed = True
        self._loop.remove_reader(self._listening)
        if self._timer is not None:
            self._timer.cancel()

    def _listen(self) -> None:
        self._timer = None
        self._loop.add_reader(self._listening, self._waiting)

    def _waiting(self) -> None:
        if self._ahead():
            self._rest(_WAY, self._after_all)
        else:
            self._take()

    def _rest(self, seconds: float, then: Callable[[], None]) -> None:
        self._loop.remove_reader(self._listening)
        self._timer = self._loop.call_later(seconds, then)

    def _after_all(self) -> None:
        self._listen()
        self._take()

    def _take(self) -> None:
        """One at a time: what else waits may be for another worker."""
        try:
            connection, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.error("No connection can be taken: %s", error)
            self._rest(_PAUSE, self._listen)
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opening: asyncio.Task[object] = self._loop.create_task(self._open(connection))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection)
        except OSError:
            connection.close()
