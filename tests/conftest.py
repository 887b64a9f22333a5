"""Shared pieces of the end-to-end tests: a proxy on a port of the kernel's choice, and simulated engines."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import pytest
from hypothesis import HealthCheck, settings
from multidict import CIMultiDict

from disagg_proxy import compiled
from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.config import Config
from disagg_proxy.server.http_server import Server, listen, server_config
from disagg_proxy.services import Services
from disagg_sim import engine
from tests.event_loop import StallFreeLoop
from tests.ports import hold_port

pytest.register_assert_rewrite("tests.simulated", "tests.command")

LOCAL = {"http_host": "127.0.0.1", "http_port": 0, "zmq_host": "127.0.0.1", "zmq_port": 0}

# Property tests give the same verdict on a busy machine, and the same examples in every run.
settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


_MYPYC_THROWS = r"ignore:the \(type, exc, tb\) signature of throw:DeprecationWarning"
"""Of code that mypyc makes, from Python 3.12 on; such code of the project's own is still an error."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if compiled():
        for item in items:
            item.add_marker(pytest.mark.filterwarnings(_MYPYC_THROWS))
            if item.get_closest_marker("interpreted"):
                item.add_marker(pytest.mark.skip(reason="the hot path is compiled"))


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"stall-free": StallFreeLoop}


class _Server(Server):
    """Leaves the test runner's signal handlers alone, and ends when it is told to, not at its next look."""

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._services.shutdown.begun.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Proxy:
    """A running proxy: its URL, and its services to look into."""

    def __init__(self, config: Config) -> None:
        self.socket: socket.socket = listen(config)
        # The registry and the timers count the same seconds.
        self.services = Services(config, asyncio.get_running_loop().time)
        self.server = _Server(server_config(config, self.services), self.services)
        host, port = self.socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.zmq = f"127.0.0.1:{self.services.discovery.listener.port}"
        self._changed = asyncio.Event()
        self.services.registry.watch(changed=lambda instance: self._changed.set())
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._serving = asyncio.create_task(self.server.serve(sockets=[self.socket]))
        while not self.server.started:
            if self._serving.done():
                self._serving.result()
                raise RuntimeError("the proxy ended at its start")
            await asyncio.sleep(0.002)

    async def stop(self) -> None:
        if not self.services.shutdown.begun.is_set():
            self.server.on_signal()
        if self._serving is not None:
            await self._serving
        self.socket.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that a change in the registry brings about, or time alone, as a breaker's half-open."""
        while not condition():
            self._changed.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 0.05)

    async def until_pairs(self, count: int = 1) -> None:
        await self.until(lambda: self.services.selection.ready_pairs() >= count)

    def knows(self, address: str) -> bool:
        return any(i.http.text == address for i in self.services.registry.instances())

    def instance(self, address: str) -> Instance:
        return next(i for i in self.services.registry.instances() if i.http.text == address)

    async def until_state(self, address: str, state: State) -> None:
        await self.until(lambda: self.knows(address) and self.instance(address).state is state)

    async def until_clients(self, count: int) -> None:
        """Wait until so many exchanges are left; one ends a moment after its client has the whole answer."""
        while self.services.stats.in_flight != count:
            await asyncio.sleep(0)

    async def until_quiet(self) -> None:
        """Wait until no background work (drains, abandoned prefills) is left."""
        while tasks := set(self.services.background._tasks):
            await asyncio.wait(tasks)

    async def until_idle(self) -> None:
        """Wait until no exchange with a client is left either."""
        exchanges, background = self.services.shutdown.exchanges, self.services.background
        while (tasks := set(self.server.server_state.tasks)) or exchanges.open or len(background):
            if tasks:
                await asyncio.wait(tasks)
            await exchanges.ended()
            await background.ended()

    @property
    def exchanges(self) -> int:
        """Requests whose head is here and whose answer is not over, whichever way they came in."""
        return len(self.server.server_state.tasks) + len(self.services.shutdown.exchanges.open)


@asynccontextmanager
async def running_proxy(**settings: Any) -> AsyncIterator[Proxy]:
    """A proxy with these settings, stopped at the end."""
    proxy = Proxy(Config(**{**LOCAL, "shutdown_grace": 5.0, "probe_interval": 0.5, **settings}))
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()


# Commands under test inherit it; under `nohup` it would be ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _sigpipe_stays_ignored() -> Iterator[None]:
    """Otherwise a later write to a closed connection ends this process, and with it an innocent test."""
    yield
    handler = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    assert handler is signal.SIG_IGN, "the test has changed the handler of SIGPIPE"


@pytest.fixture(autouse=True)
def _engines_keep_their_ports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A simulated engine's ports stay its own to the end of the test, so that nobody answers for one that is gone."""
    bound = engine._bound

    def kept(host: str, port: int) -> socket.socket:
        return bound(host, port or hold_port(hold, host))

    with ExitStack() as hold:
        monkeypatch.setattr(engine, "_bound", kept)
        yield


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that keeps nothing between tests."""
    async with aiohttp.ClientSession() as session:
        yield session


T = TypeVar("T")


async def soon(awaitable: Awaitable[T]) -> T:
    """The result, or a failure of the test where it does not come."""
    return await asyncio.wait_for(awaitable, 60.0)


class Wire:
    """A bare HTTP/1.1 connection, for what no well-behaved client does.

    Attributes:
        chunked: send bodies in chunks, so that generation requests go through Quart.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.chunked = False
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes | str) -> None:
        self.writer.write(data.encode() if isinstance(data, str) else data)

    def start(self, path: str, *headers: str) -> None:
        """Send the head of a POST; the body is the caller's."""
        lines = [f"POST {path} HTTP/1.1", "Host: proxy", "Content-Type: application/json", *headers]
        self.send("\r\n".join(lines) + "\r\n\r\n")

    def post(self, path: str, body: Any, *headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self.chunked:
            self.start(path, "Transfer-Encoding: chunked", *headers)
            self.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(raw), raw))
        else:
            self.start(path, f"Content-Length: {len(raw)}", *headers)
            self.send(raw)

    async def head(self) -> tuple[int, CIMultiDict[str]]:
        """Status and headers of an answer."""
        status, *lines = (await soon(self.reader.readuntil(b"\r\n\r\n"))).decode().rstrip().split("\r\n")
        return int(status.split()[1]), CIMultiDict(line.split(": ", 1) for line in lines)

    async def chunk(self) -> bytes:
        """One piece of a chunked body; empty at its end."""
        size = int(await soon(self.reader.readuntil(b"\r\n")), 16)
        return (await soon(self.reader.readexactly(size + 2)))[:-2]

    async def answer(self) -> tuple[int, CIMultiDict[str], bytes]:
        """A whole answer."""
        status, headers = await self.head()
        if "Content-Length" in headers:
            return status, headers, await soon(self.reader.readexactly(int(headers["Content-Length"])))
        body = b""
        while piece := await self.chunk():
            body += piece
        return status, headers, body

    def leave(self) -> None:
        """Drop the connection at once."""
        self.writer.transport.abort()


@pytest.fixture
async def dial() -> AsyncIterator[Callable[[str], Awaitable[Wire]]]:
    """Opens bare connections to a URL, and drops them at the end."""
    wires: list[Wire] = []

    async def open_one(url: str) -> Wire:
        parts = urlsplit(url)
        wires.append(Wire(*await asyncio.open_connection(parts.hostname, parts.port)))
        return wires[-1]

    yield open_one
    for wire in wires:
        wire.leave()
