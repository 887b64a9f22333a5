"""The HTTP server around the application: socket, uvicorn's configuration, and shutdown. Reasons: docs/server.md."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from disagg_proxy.config import Config
from disagg_proxy.discovery.listener import BindError
from disagg_proxy.runtime.hangup import on_hangup
from disagg_proxy.server.asgi import create_app
from disagg_proxy.server.client_connection import ClientConnection, connection_class
from disagg_proxy.services import Services
from disagg_proxy.telemetry.logs import uvicorn_level

log = logging.getLogger(__name__)

_BACKLOG = 2048

_GC_THRESHOLDS = (20_000, 20, 20)
"""Of the garbage collector: allocations, then collections of the younger generation."""

_KEEP_ALIVE = 75
"""Seconds for which an idle client connection is kept; longer than in the pools of common clients, so that they close
first."""

_CANCEL_TIMEOUT = 1.0
"""Seconds for which cancelled exchanges are waited for."""

_POLL_INTERVAL = 0.02
"""Seconds between two checks for open connections during a shutdown."""


def listen(config: Config) -> socket.socket:
    """The HTTP socket, bound and listening. Called before anything else starts.

    Raises:
        BindError: the address cannot be bound.
    """
    host, port = config.http_host, config.http_port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # asyncio sets TCP_NODELAY on accepted connections only if the protocol is given; uvloop always does.
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
    """Raise the soft limit of file descriptors to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some systems refuse the limit that they report; the current one then stays.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def tune_garbage_collector() -> None:
    """Exclude the objects that exist at startup from garbage collections, and collect less often.

    A request allocates hundreds of objects that live as long as it does, few of them in cycles. With Python's default
    thresholds an eighth of its CPU time is spent on collections.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def server_config(config: Config, services: Services) -> uvicorn.Config:
    """uvicorn on uvloop and httptools, with the application of ``services``."""
    _raise_file_limit()
    return uvicorn.Config(
        create_app(config, services),
        loop="uvloop",
        http=connection_class(config, services),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level=uvicorn_level(config),
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        backlog=_BACKLOG,
    )


class Server(uvicorn.Server):
    """uvicorn with another shutdown: the port stays open, and answers 503, until accepted requests are complete.

    uvicorn (0.30 - 0.54, ``server.py``) closes the port and idle connections first, gives requests the complete grace
    time before the application may end its background work, and skips that work after a second signal.

    Args:
        reload: called on SIGHUP; None leaves that signal alone.
    """

    def __init__(self, config: uvicorn.Config, services: Services, reload: Callable[[], None] | None = None) -> None:
        super().__init__(config)
        self._services = services
        self._reload = reload
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, then shut down."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve in a process that does nothing else."""
        tune_garbage_collector()
        super().run(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Within, SIGTERM and SIGINT shut down, and SIGHUP reloads."""
        with contextlib.ExitStack() as stack:
            if self._reload is not None:
                stack.enter_context(on_hangup(self._reload))
            stack.enter_context(super().capture_signals())
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler. It only schedules :meth:`on_signal`, as Python may run it between any instructions."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.on_signal)

    def on_signal(self) -> None:
        """Begin the shutdown; at the second signal, end its grace time."""
        shutdown = self._services.shutdown
        if shutdown.begun.is_set():
            log.warning("Stopping at once")
            shutdown.expire()
            return
        log.info("Stopping; what was accepted gets %g s (SHUTDOWN_GRACE)", self._services.config.shutdown_grace)
        shutdown.begin()
        for connection in list(self.server_state.connections):
            if isinstance(connection, ClientConnection):
                connection.begin_shutdown()

    async def on_tick(self, counter: int) -> bool:
        """Whether the shutdown has begun.

        ``should_exit`` is not used: if it is set during the startup, older versions of uvicorn skip the shutdown.
        """
        return await super().on_tick(counter) or self._services.shutdown.begun.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Complete accepted requests, close the port, cut off the rest, then stop the services."""
        shutdown = self._services.shutdown
        if not shutdown.begun.is_set():
            self.on_signal()
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
        """Wait until no exchange and no background work runs."""
        exchanges, background = self._services.shutdown.exchanges, self._services.background
        while self.server_state.tasks or exchanges.open or len(background):
            await exchanges.ended()
            if self.server_state.tasks:
                await asyncio.wait(set(self.server_state.tasks))
            await background.ended()

    async def _disconnected(self) -> None:
        """Wait until every client has received the rest of its response."""
        while self.server_state.connections:
            await asyncio.sleep(_POLL_INTERVAL)
            # Also those that had been accepted, but were not connections yet, when the port was closed.
            for connection in list(self.server_state.connections):
                connection.shutdown()

    async def _cut_off(self) -> None:
        """End the exchanges that still run; a client without a response gets 503."""
        self._services.recorder.force_closing = True
        tasks = set(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        for exchange in list(self._services.shutdown.exchanges.open):
            exchange.cut_off()
        for connection in list(self.server_state.connections):
            if isinstance(connection, ClientConnection):
                connection.abort_if_blocked()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_TIMEOUT)
