"""A server whose answers, and ends of connections, the test writes byte by byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Instance, Role, Source
from disagg_proxy.connectors.p2p_nccl import KIND as P2P
from disagg_proxy.runtime.write_coalescing import WriteBatch
from disagg_proxy.upstream import Response, Upstream
from tests.conftest import soon

CLOSE = None
"""In an answer's place, or behind it: the server closes the connection."""


class Server:
    """Answers each request with the next of ``answers``, of which each is one piece or several."""

    def __init__(self) -> None:
        self.answers: list[bytes | tuple[bytes | None, ...] | None] = []
        self.asked: list[tuple[bytes, int]] = []
        self.bodies: list[bytes] = []
        self.gone = asyncio.Event()
        self.more = asyncio.Event()
        """Between two pieces of an answer."""
        self.writer: asyncio.StreamWriter
        self.address = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.asked.append((head, writer.get_extra_info("peername")[1]))
                length = [line for line in head.split(b"\r\n") if line.startswith(b"content-length: ")]
                self.bodies.append(await reader.readexactly(int(length[0][16:])) if length else b"")
                answer = self.answers.pop(0)
                for number, piece in enumerate(answer if isinstance(answer, tuple) else (answer,)):
                    if number:
                        await self.more.wait()
                        self.more.clear()
                    if piece is CLOSE:
                        return
                    writer.write(piece)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()

    @property
    def ports(self) -> list[int]:
        """The client's port of each request: the same one on the same connection."""
        return [port for _, port in self.asked]

    def instance(self, address: str = "") -> Instance:
        return Instance(Role.DECODE, parse_address(address or self.address), None, Source.STATIC, P2P)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    yield server
    listening.close()


Ask = Callable[..., Awaitable[Response]]


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    upstream = Upstream(0.2, WriteBatch())
    yield upstream
    await upstream.close()


@pytest.fixture
def ask(server: Server, upstream: Upstream) -> Ask:
    async def send(*, address: str = "", idle_timeout: float = 5.0, method: str = "GET", **options: object) -> Response:
        options = {"leg": "decode", "idle_timeout": idle_timeout, **options}
        return await soon(upstream.request(method, server.instance(address), "/x", **options))

    return send
