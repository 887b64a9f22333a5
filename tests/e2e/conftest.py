"""A proxy with one simulated prefill and one simulated decode instance behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from disagg_proxy.sim import SimConfig, SimEngine
from tests.conftest import Proxy, running_proxy


class Machine:
    """Proxy and engines of one test; engines are added as the test wants them."""

    def __init__(self, proxy: Proxy, stack: AsyncExitStack, http: aiohttp.ClientSession) -> None:
        self.proxy = proxy
        self.http = http
        self._stack = stack

    async def engine(self, role: str, **knobs: Any) -> SimEngine:
        engine = SimEngine(SimConfig(role=role, proxy=self.proxy.zmq, ping_seconds=0.2, **knobs))
        await engine.start()
        self._stack.push_async_callback(engine.stop)
        return engine

    async def pair(self, **knobs: Any) -> tuple[SimEngine, SimEngine]:
        before = self.proxy.services.pairing.ready_pairs()
        engines = await self.engine("prefill", **knobs), await self.engine("decode", **knobs)
        await self.proxy.until_pairs(before + 1)
        return engines

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers and decoded JSON of one POST."""
        async with self.http.post(self.proxy.url + path, json=body, headers=headers) as answer:
            return answer.status, answer.headers, await answer.json()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.proxy.url + path) as answer:
            return answer.status, await answer.json()


@pytest.fixture
async def machine(http: aiohttp.ClientSession, request: pytest.FixtureRequest) -> AsyncIterator[Machine]:
    """Mark a test with ``settings(...)`` to configure its proxy."""
    mark = request.node.get_closest_marker("settings")
    async with running_proxy(**(mark.kwargs if mark else {})) as proxy, AsyncExitStack() as stack:
        yield Machine(proxy, stack, http)


@pytest.fixture
async def pair(machine: Machine) -> tuple[SimEngine, SimEngine]:
    return await machine.pair()
