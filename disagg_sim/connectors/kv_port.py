"""The TCP port of a KV connector: accepted connections and their end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from disagg_sim.kv_wire import close_server, reset, stop_listening


class KvPort:
    """Accepts connections until stopped.

    Args:
        serve: handles one connection. When it returns, the connection is reset unless ``serve`` has closed it.
    """

    def __init__(self, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        self._serve = serve
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> None:
        """Listen on a bound socket."""
        self._server = await asyncio.start_server(self._accept, sock=sock)

    async def stop(self) -> None:
        """Reset every connection and end. Safe to call twice."""
        if self._server is not None:
            stop_listening(self._server)
            await close_server(self._server)
        connections = dict(self._connections)
        for task, writer in connections.items():
            reset(writer.transport)
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # by stop(); asyncio.streams would report a cancelled connection as an error
        finally:
            del self._connections[task]
            if not writer.is_closing():
                reset(writer.transport)
