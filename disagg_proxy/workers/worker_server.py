"""The HTTP server of one worker, on the listening socket that all workers share.

One socket, not one per worker (``SO_REUSEPORT``): a pending connection belongs to no worker yet, so a worker that dies
loses only connections that it has accepted, and a stopped one accepts none. The kernel wakes every idle worker for a
connection; workers with more clients than another one wait a moment first. That keeps the numbers of clients even, also
when many connections arrive at once and stay open.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import cast

import uvicorn

from disagg_proxy.server.http_server import Server
from disagg_proxy.services import Services
from disagg_proxy.workers.worker_peers import WorkerPeers

log = logging.getLogger(__name__)

_YIELD = 0.002
"""Seconds for which a worker with more clients leaves a connection to the others."""

_RETRY_AFTER = 1.0
"""Seconds until the next accept after the system has refused one for lack of descriptors or memory."""


class Acceptor:
    """Accepts connections from a shared socket. uvicorn uses it like an ``asyncio.Server``.

    Args:
        listening: bound and listening; not closed here.
        protocol: creates the protocol of a connection.
        others_first: whether another worker has fewer clients.
    """

    def __init__(
        self, listening: socket.socket, protocol: Callable[[], asyncio.Protocol], others_first: Callable[[], bool]
    ) -> None:
        self._listening = listening
        self._protocol = protocol
        self._others_first = others_first
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[object]] = set()
        self._closed = False
        listening.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Stop accepting; the socket stays open."""
        self._closed = True
        self._loop.remove_reader(self._listening)
        if self._timer is not None:
            self._timer.cancel()

    def _listen(self) -> None:
        self._timer = None
        self._loop.add_reader(self._listening, self._readable)

    def _readable(self) -> None:
        if self._others_first():
            self._pause(_YIELD, self._listen_and_accept)
        else:
            self._accept()

    def _pause(self, seconds: float, then: Callable[[], None]) -> None:
        self._loop.remove_reader(self._listening)
        self._timer = self._loop.call_later(seconds, then)

    def _listen_and_accept(self) -> None:
        self._listen()
        self._accept()

    def _accept(self) -> None:
        """Accept one connection: further pending ones may go to other workers."""
        try:
            connection, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.error("Could not accept a connection: %s", error)
            self._pause(_RETRY_AFTER, self._listen)
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


class WorkerServer(Server):
    """The server of a single process, with an :class:`Acceptor` instead of a listening socket of its own."""

    def __init__(
        self, config: uvicorn.Config, services: Services, listening: socket.socket, peers: WorkerPeers
    ) -> None:
        super().__init__(config, services)
        self._listening = listening
        self._peers = peers
        peers.attach(self.request_stop, lambda: len(self.server_state.connections))

    def request_stop(self, at_once: bool) -> None:
        """Shut down, on behalf of the supervisor.

        A terminal or service manager may have signalled this process too: the supervisor's first request is ignored
        then, since a second signal would skip the grace time.

        Args:
            at_once: skip the grace time.
        """
        begun = self._services.shutdown.begun.is_set()
        if not begun:
            self.on_signal()
        if at_once:
            self.on_signal()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the services, then accept connections."""
        await super().startup(sockets=[])
        acceptor = Acceptor(self._listening, self._protocol, self._peers.others_first)
        self.servers.append(cast(asyncio.Server, acceptor))
        self._peers.serving()

    def _protocol(self) -> asyncio.Protocol:
        # As in uvicorn (0.30 - 0.54, ``server.py``, create_protocol).
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As in a single process, with the shared socket."""
        await super().shutdown([self._listening])
