"""One exchange with one instance: the outcome for everything that a server can do, and which connection is used."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack

import aiohttp
import pytest

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Instance, Role, Source
from disagg_proxy.errors import EngineDeadline, EngineDisconnected, EngineError, EngineUnreachable
from disagg_proxy.upstream import Answer, Upstream, client
from tests.conftest import soon

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"
CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"


class Server:
    """Answers each request with the next of ``answers``; None resets the connection instead."""

    def __init__(self) -> None:
        self.answers: list[bytes | None] = []
        self.asked: list[tuple[bytes, int]] = []
        self.gone = asyncio.Event()
        self.hang_up: asyncio.Event | None = None
        self.address = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.asked.append((head, writer.get_extra_info("peername")[1]))
                answer = self.answers.pop(0)
                if answer is None:
                    break
                writer.write(answer)
                if self.hang_up is not None:
                    await self.hang_up.wait()
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()

    @property
    def ports(self) -> list[int]:
        """The client's port of each request: the same one on the same connection."""
        return [port for _, port in self.asked]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    yield server
    listening.close()


Ask = Callable[..., Awaitable[Answer]]


@pytest.fixture
async def ask(server: Server) -> AsyncIterator[Ask]:
    upstream = Upstream(connect_timeout=0.2)

    async def send(*, address: str = "", silence: float = 5.0, fresh: bool = False) -> Answer:
        instance = Instance(Role.DECODE, parse_address(address or server.address), None, Source.STATIC)
        return await soon(
            upstream.request("GET", instance, "/x", headers={}, silence=silence, leg="decode", fresh=fresh)
        )

    yield send
    await upstream.close()


async def test_a_whole_answer(server: Server, ask: Ask) -> None:
    server.answers = [OK]
    whole = await (await ask()).whole()
    assert (whole.status, whole.body, whole.headers["content-type"]) == (200, b"{}", "application/json")


async def test_nothing_of_the_clients_own_is_added_to_the_request(server: Server, ask: Ask) -> None:
    server.answers = [OK]
    await (await ask()).whole()
    assert server.asked[0][0].split(b"\r\n")[1:] == [b"Host: " + server.address.encode(), b"", b""]


async def test_a_redirect_is_an_answer_like_any_other(server: Server, ask: Ask) -> None:
    server.answers = [b"HTTP/1.1 307 Temporary\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"]
    assert (await (await ask()).whole()).status == 307
    assert len(server.asked) == 1


async def test_connections_are_kept_and_a_fresh_one_is_not(server: Server, ask: Ask) -> None:
    server.answers = [OK] * 4
    for fresh in (False, False, True, False):
        await (await ask(fresh=fresh)).whole()
    first, second, own, third = server.ports
    assert first == second == third != own


async def test_after_an_error_answer_no_kept_connection_is_trusted_for_a_while(server, ask, monkeypatch) -> None:
    error = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
    server.answers = [OK, error, OK, OK]
    for _ in range(3):
        await (await ask()).whole()
    assert server.ports[0] == server.ports[1] != server.ports[2]
    now = asyncio.get_running_loop().time() + client._WARY
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    await (await ask()).whole()
    assert server.ports[3] != server.ports[2], "the fresh one was not kept"


def check(error: EngineError | EngineDeadline, kind: type, server: Server, **facts: bool) -> None:
    assert type(error) is kind
    assert server.address not in error.message and "decode instance" in error.message
    for name, value in facts.items():
        assert getattr(error, name) is value, name


async def test_a_refused_connection_is_unreachable(server: Server, ask: Ask) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(EngineError) as caught:
            await ask(address=f"127.0.0.1:{closed.getsockname()[1]}")
    check(caught.value, EngineUnreachable, server)


async def test_a_connection_that_nobody_accepts_is_unreachable_after_the_timeout(server: Server, ask: Ask) -> None:
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with pytest.raises(EngineError) as caught:
            await ask(address=f"127.0.0.1:{full.getsockname()[1]}")
    check(caught.value, EngineUnreachable, server)


@pytest.mark.parametrize("reused", [False, True])
async def test_a_connection_that_ends_before_the_answer(server: Server, ask: Ask, reused: bool) -> None:
    server.answers = [OK, None]
    await (await ask(fresh=not reused)).whole()
    with pytest.raises(EngineError) as caught:
        await ask()
    check(caught.value, EngineDisconnected, server, reused=reused, unsent=False)


async def test_an_answer_that_is_no_http_at_all(server: Server, ask: Ask) -> None:
    server.answers = [b"SSH-2.0-OpenSSH_9.2\r\n\r\n"]
    with pytest.raises(EngineError) as caught:
        await ask()
    check(caught.value, EngineDisconnected, server, unsent=False)


async def test_silence_before_the_answer(server: Server, ask: Ask) -> None:
    server.answers = [b""]
    with pytest.raises(EngineDeadline) as caught:
        await ask(silence=0.05)
    check(caught.value, EngineDeadline, server)


async def test_silence_within_the_body(server: Server, ask: Ask) -> None:
    server.answers = [CUT]
    answer = await ask(silence=0.05)
    with pytest.raises(EngineDeadline) as caught:
        await soon(answer.whole())
    check(caught.value, EngineDeadline, server)
    await soon(server.gone.wait())


async def test_a_body_that_breaks_off(server: Server, ask: Ask) -> None:
    server.answers, server.hang_up = [CUT], asyncio.Event()
    pieces = (await ask()).chunks()
    assert await anext(pieces) == b"{"
    server.hang_up.set()
    with pytest.raises(EngineDisconnected) as caught:
        await soon(anext(pieces))
    check(caught.value, EngineDisconnected, server)


async def test_a_reader_that_is_cancelled_leaves_the_connection_to_its_owner(server: Server, ask: Ask) -> None:
    server.answers = [CUT]
    answer = await ask()
    pieces = answer.chunks()
    assert await anext(pieces) == b"{"
    waiting = asyncio.ensure_future(anext(pieces))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not server.gone.is_set()
    answer.close()
    await soon(server.gone.wait())


async def test_a_whole_answer_that_is_cancelled_closes_the_connection(server: Server, ask: Ask) -> None:
    server.answers = [CUT]
    waiting = asyncio.create_task((await ask()).whole())
    await asyncio.sleep(0)
    waiting.cancel()
    await soon(server.gone.wait())


async def test_only_a_write_into_a_closed_transport_means_that_nothing_was_sent() -> None:
    for error, unsent in (
        (aiohttp.ClientConnectionResetError("Cannot write to closing transport"), True),
        (aiohttp.ServerDisconnectedError(), False),
        (aiohttp.ClientOSError(104, "Connection reset by peer"), False),
        (aiohttp.ClientPayloadError(), False),
        (ConnectionResetError(), False),
        (BrokenPipeError(), False),
    ):
        found = client._translate(error, "decode", reused=True)
        assert isinstance(found, EngineDisconnected) and found.unsent is unsent, error


async def test_everything_is_closed_in_the_end(server: Server) -> None:
    server.answers = [OK]
    async with AsyncExitStack() as stack:
        upstream = Upstream(connect_timeout=1.0)
        stack.push_async_callback(upstream.close)
        instance = Instance(Role.DECODE, parse_address(server.address), None, Source.STATIC)
        answer = await upstream.request("GET", instance, "/", headers={}, silence=1.0, leg="decode")
        await answer.whole()
    await soon(server.gone.wait())
