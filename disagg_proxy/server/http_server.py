"""The HTTP server around the application: which socket, which ASGI server, and how it ends. Reasons: docs/server.md."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import socket
from types import FrameType

import uvicorn

from disagg_proxy.config import Config
from disagg_proxy.discovery.listener import BindError
from disagg_proxy.server.asgi import create_app
from disagg_proxy.server.client_connection import Protocol, protocol
from disagg_proxy.services import Services

log = logging.getLogger(__name__)

_BACKLOG = 2048

_COLLECT = (20_000, 20, 20)
"""Thresholds of the garbage collector's generations, in objects and collections."""

_KEEP_ALIVE = 75
"""Seconds an idle client connection is kept; longer than the pools of common clients, so that they close first."""

_LAST_WORD = 1.0
"""Seconds that an exchange gets to end once it was cut off."""

_LOOK = 0.02
"""Seconds between two looks at who is still connected, at the end."""


def listen(config: Config) -> socket.socket:
    """The HTTP socket, bound and listening before anything else starts.

    Raises:
        BindError: it cannot be bound.
    """
    host, port = config.http_host, config.http_port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # With the protocol named, asyncio sets TCP_NODELAY on what is accepted; uvloop always does.
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise BindError(
            f"cannot listen for clients on {host}:{port} (HTTP_PROXY_HOST, HTTP_PROXY_PORT): {error}"
        ) from None
    return listening


def _raise_file_limit() -> None:
    """Allow this process as many connections as the system lets it have without asking."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some systems refuse what they report as their own limit; the one in force remains.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def settle_memory() -> None:
    """Leave what was made at the start out of every later garbage collection, and collect less often.

    A request makes hundreds of objects that live for its duration, few of them in cycles; with Python's own thresholds
    an eighth of its CPU time goes into looking through them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT)


def server_config(config: Config, services: Services) -> uvicorn.Config:
    """uvicorn on uvloop and httptools, with the application of ``services``."""
    _raise_file_limit()
    return uvicorn.Config(
        create_app(config, services),
        loop="uvloop",
        http=protocol(config, services),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level=max(logging.WARNING, logging.getLevelName(config.log_level.upper())),
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        backlog=_BACKLOG,
    )


class Server(uvicorn.Server):
    """uvicorn with an end of its own: the port stays open, and says 503, until everything accepted is done.

    uvicorn (0.30 - 0.54, ``server.py``) closes the port and all idle connections first, gives the rest its whole time
    before the application may end what it does in the background, and skips that after a second signal.
    """

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Run until a signal, and the end that it begins."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """The whole life of a process that does nothing else."""
        settle_memory()
        super().run(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by Python between any two instructions, so that nothing may be touched here."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.signalled)

    def signalled(self) -> None:
        """The first time the end begins, the next time it is cut short."""
        shutdown = self._services.shutdown
        if shutdown.begun.is_set():
            log.warning("Stopping at once")
            shutdown.expire()
            return
        log.info("Stopping; what was accepted gets %g s (SHUTDOWN_GRACE)", self._services.config.shutdown_grace)
        shutdown.begin()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Protocol):
                connection.last_call()

    async def on_tick(self, counter: int) -> bool:
        """Whether the end has begun. With ``should_exit`` set during the start, older versions would skip the end."""
        return await super().on_tick(counter) or self._services.shutdown.begun.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what was accepted, close the port, cut off what is late, then stop the services."""
        shutdown = self._services.shutdown
        if not shutdown.begun.is_set():
            self.signalled()
        await shutdown.wait(self._finished(), shutdown.remaining_for_requests)
        for server in self.servers:
            server.close()
        for listening in sockets or ():
            listening.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await shutdown.wait(self._disconnected(), shutdown.remaining_for_requests)
        await self._cut_off()
        await self.lifespan.shutdown()

    async def _finished(self) -> None:
        """Until no exchange runs, and nothing in the background."""
        exchanges, background = self._services.shutdown.exchanges, self._services.background
        while self.server_state.tasks or exchanges.open or len(background):
            await exchanges.ended()
            if self.server_state.tasks:
                await asyncio.wait(set(self.server_state.tasks))
            await background.ended()

    async def _disconnected(self) -> None:
        """Until every client has taken the rest of its answer."""
        while self.server_state.connections:
            await asyncio.sleep(_LOOK)

    async def _cut_off(self) -> None:
        """End the exchanges that still run; a client without an answer gets 503."""
        self._services.recorder.cutting_off = True
        late = set(self.server_state.tasks)
        for task in late:
            task.cancel()
        for exchange in list(self._services.shutdown.exchanges.open):
            exchange.cut_off()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Protocol):
                connection.let_go()
        if late:
            await asyncio.wait(late, timeout=_LAST_WORD)
