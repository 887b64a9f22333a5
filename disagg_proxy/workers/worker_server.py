"""The HTTP server of one worker: as that of a proxy by itself, on a socket that all workers share."""

from __future__ import annotations

import asyncio
import socket
from typing import cast

import uvicorn

from disagg_proxy.server.http_server import Server
from disagg_proxy.services import Services
from disagg_proxy.workers.acceptor import Acceptor
from disagg_proxy.workers.worker_peers import WorkerPeers


class WorkerServer(Server):
    """Takes connections by turns with the other workers."""

    def __init__(
        self, config: uvicorn.Config, services: Services, listening: socket.socket, member: WorkerPeers
    ) -> None:
        super().__init__(config, services)
        self._listening = listening
        self._member = member
        member.attach(self.told_to_stop, lambda: len(self.server_state.connections))

    def told_to_stop(self, at_once: bool) -> None:
        """By the supervisor, who says so once where a terminal or a service manager may say it to all."""
        begun = self._services.shutdown.begun.is_set()
        if not begun:
            self.on_signal()
        if at_once:
            self.on_signal()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the services, then take connections."""
        await super().startup(sockets=[])
        acceptor = Acceptor(self._listening, self._protocol, self._member.ahead)
        self.servers.append(cast(asyncio.Server, acceptor))
        self._member.serving()

    def _protocol(self) -> asyncio.Protocol:
        # As in uvicorn (0.30 - 0.54, ``server.py``, create_protocol).
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As without other workers."""
        await super().shutdown([self._listening])
