"""The end of the HTTP server, in an order that clients cannot bring about reliably."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import uvicorn

from disagg_proxy.runtime.background import Background
from disagg_proxy.runtime.shutdown import Shutdown
from disagg_proxy.server.http_server import Server
from disagg_proxy.services import Services
from tests.conftest import soon


class _Idle:
    """A connection without a request. ``connections`` are those of the server."""

    def __init__(self, connections: set[Any]) -> None:
        self._connections = connections

    def shutdown(self) -> None:
        self._connections.discard(self)


async def test_a_connection_accepted_while_the_port_closes_does_not_hold_up_the_shutdown() -> None:
    loop = asyncio.get_running_loop()
    services = SimpleNamespace(
        config=SimpleNamespace(shutdown_grace=600.0),
        shutdown=Shutdown(600.0, loop.time),
        background=Background(),
        recorder=SimpleNamespace(force_closing=False),
    )
    server = Server(uvicorn.Config("app", lifespan="off"), cast(Services, services))
    server.lifespan = cast(Any, _NoLifespan())
    connections = server.server_state.connections
    late = cast(Any, _Idle(connections))
    # asyncio makes the protocol of an accepted socket in a later iteration of the event loop.
    port = SimpleNamespace(close=lambda: loop.call_soon(connections.add, late))
    server.servers = [cast(Any, port)]
    await soon(server.shutdown())
    assert late not in connections


class _NoLifespan:
    async def shutdown(self) -> None:
        """There is no application."""
