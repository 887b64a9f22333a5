"""Frames that the simulated vLLM connectors exchange (a length in 4 bytes, then msgpack), and TCP resets.

vLLM's P2pNcclConnector sends control messages over ZMQ and tensors over NCCL. Here both share one TCP connection per
pair, in which ``DATA`` frames take the place of NCCL.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any

import msgpack

_LENGTH = struct.Struct("!I")
_LINGER_NOT = struct.pack("ii", 1, 0)


def pack(frame: dict[str, Any]) -> bytes:
    """One frame as bytes."""
    body: bytes = msgpack.packb(frame)
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next frame, None when the connection has ended, orderly or not."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        frame: dict[str, Any] = msgpack.unpackb(await reader.readexactly(length))
        return frame
    except (asyncio.IncompleteReadError, ConnectionError, OSError):
        return None


def stop_listening(server: asyncio.Server) -> None:
    """Refuse new connections at once. :func:`close_server` does the rest."""
    for listener in server.sockets:
        asyncio.get_running_loop().remove_reader(listener)
        listener.shutdown(socket.SHUT_RDWR)


async def close_server(server: asyncio.Server) -> None:
    """Close a server that no longer listens, when each connection that it has accepted has its protocol.

    A server that is closed before leaves the accepted socket open (Python 3.11, ``asyncio/base_events.py``,
    ``Server._attach``).
    """
    for _ in range(5):
        await asyncio.sleep(0)
    server.close()


def reset(transport: asyncio.BaseTransport) -> None:
    """Close a connection at once with a TCP reset and drop what was not sent."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.fileno() != -1:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    if isinstance(transport, asyncio.WriteTransport):
        transport.abort()
