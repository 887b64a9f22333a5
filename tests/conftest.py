"""Shared pieces of the end-to-end tests: a proxy on a port of the kernel's choice, and simulated engines."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import pytest
import uvicorn

from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.config import Config
from disagg_proxy.server import listen, server_config
from disagg_proxy.services import Services

LOCAL = {"http_host": "127.0.0.1", "http_port": 0, "zmq_host": "127.0.0.1", "zmq_port": 0}


class _Server(uvicorn.Server):
    """Leaves the test runner's signal handlers alone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Proxy:
    """A running proxy: its URL, and its services to look into."""

    def __init__(self, config: Config) -> None:
        self.socket: socket.socket = listen(config)
        self.services = Services(config)
        self.server = _Server(server_config(config, self.services))
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
        self.server.should_exit = True
        if self._serving is not None:
            await self._serving
        self.socket.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that a change in the registry brings about."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def until_pairs(self, count: int = 1) -> None:
        await self.until(lambda: self.services.pairing.ready_pairs() >= count)

    def instance(self, address: str) -> Instance:
        return next(i for i in self.services.registry.instances() if i.http.text == address)

    async def until_state(self, address: str, state: State) -> None:
        await self.until(lambda: self.instance(address).state is state)

    async def until_quiet(self) -> None:
        """Wait until no background work (drains, abandoned prefills) is left."""
        while tasks := set(self.services.background._tasks):
            await asyncio.wait(tasks)


@asynccontextmanager
async def running_proxy(**settings: Any) -> AsyncIterator[Proxy]:
    """A proxy with these settings, stopped at the end."""
    proxy = Proxy(Config(**{**LOCAL, "shutdown_grace": 5.0, "probe_interval": 0.5, **settings}))
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that keeps nothing between tests."""
    async with aiohttp.ClientSession() as session:
        yield session


Wait = Callable[..., Awaitable[None]]
