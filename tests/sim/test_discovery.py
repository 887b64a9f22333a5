"""Pings: what they say, when they begin, and that they prove nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import msgpack
import pytest
import zmq
import zmq.asyncio

from disagg_sim import SimConfig, SimEngine

from .pair import COMPLETIONS


class Router:
    def __init__(self, sock: zmq.asyncio.Socket, address: str) -> None:
        self.sock = sock
        self.address = address

    async def ping(self) -> tuple[str, dict[str, Any]]:
        identity, message = await self.sock.recv_multipart()
        return identity.decode(), msgpack.unpackb(message)


@contextmanager
def router(host: str = "127.0.0.1") -> Iterator[Router]:
    context = zmq.asyncio.Context()
    sock = context.socket(zmq.ROUTER)
    sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
    sock.setsockopt(zmq.IPV6, ":" in host)
    shown = f"[{host}]" if ":" in host else host
    port = sock.bind_to_random_port(f"tcp://{shown}")
    try:
        yield Router(sock, f"{shown}:{port}")
    finally:
        context.destroy(linger=0)


@pytest.fixture
async def proxy() -> AsyncIterator[Router]:
    with router() as one:
        yield one


@pytest.mark.parametrize(("role", "kind"), [("prefill", "P"), ("decode", "D")])
async def test_a_ping_names_both_addresses_and_its_identity_is_the_kv_address(
    proxy: Router, role: Any, kind: str
) -> None:
    engine = SimEngine(SimConfig(role=role, proxy=proxy.address))
    await engine.start()
    expected = {"type": kind, "http_address": engine.http_address, "zmq_address": engine.kv_address}
    assert await proxy.ping() == (engine.kv_address, expected)
    await engine.stop()


async def test_pings_begin_before_http_answers(proxy: Router) -> None:
    engine = SimEngine(SimConfig(proxy=proxy.address, startup_seconds=3600))
    starting = asyncio.create_task(engine.start())
    _, ping = await proxy.ping()
    assert ping["http_address"] == engine.http_address
    assert not engine.state()["ready"]
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.get(f"http://{engine.http_address}/health")
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await engine.stop()


async def test_pings_and_health_go_on_while_the_engine_hangs(proxy: Router) -> None:
    engine = SimEngine(SimConfig(role="decode", proxy=proxy.address, ping_seconds=0.01))
    await engine.start()
    async with aiohttp.ClientSession() as http:
        url = f"http://{engine.http_address}"
        headers = {"X-Request-Id": "___prefill_addr_127.0.0.1:1___decode_addr_127.0.0.1:2_x"}
        victim = asyncio.create_task(http.post(f"{url}{COMPLETIONS}", json={"prompt": "a b"}, headers=headers))
        state = await engine.wait_until(lambda s: s["stalled_on"] is not None)
        await engine.wait_until(lambda s, sent=state["pings"]: s["pings"] >= sent + 3)
        for _ in range(state["pings"] + 3):
            await proxy.ping()
        async with http.get(f"{url}/health") as response:
            assert response.status == 200
        assert engine.state()["stalled_on"] is not None
        victim.cancel()
        await asyncio.gather(victim, return_exceptions=True)
    await engine.kill()


async def test_a_restarted_engine_pings_under_the_same_identity(proxy: Router) -> None:
    engine = SimEngine(SimConfig(proxy=proxy.address))
    await engine.start()
    identity, _ = await proxy.ping()
    await engine.kill()
    again = engine.restarted()
    await again.start()
    assert (await proxy.ping())[0] == identity
    await again.stop()


async def test_a_silent_engine_serves_but_does_not_ping(proxy: Router) -> None:
    engine = SimEngine(SimConfig(proxy=proxy.address, ping_seconds=0.01))
    engine.faults.pings = False
    await engine.start()
    async with aiohttp.ClientSession() as http, http.get(f"http://{engine.http_address}/health") as response:
        assert response.status == 200
    assert engine.state()["pings"] == 0
    engine.faults.pings = True
    await proxy.ping()
    await engine.stop()


async def test_ipv6() -> None:
    with router("::1") as proxy:
        engine = SimEngine(SimConfig(host="::1", proxy=proxy.address))
        await engine.start()
        identity, ping = await proxy.ping()
        assert identity == ping["zmq_address"] == engine.kv_address
        await engine.stop()
