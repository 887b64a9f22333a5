"""The proxy and its pair are those of tests/simulated.py; what else several failure tests need."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from disagg_proxy.health.liveness import LivenessConnections
from disagg_sim import SimEngine
from tests.conftest import Proxy, Wire
from tests.simulated import REQUESTS, Machine, machine, pair

__all__ = ["machine", "pair"]

Dial = Callable[[str], Awaitable[Wire]]

# With logprobs every token is about a kilobyte, so the stream is several times what all socket buffers hold.
LARGE = {**REQUESTS["/v1/completions"], "max_tokens": 3000, "ignore_eos": True, "logprobs": 20, "stream": True}
SMALL = 16 * 1024

in_turn = pytest.mark.settings(prefill_policy="round_robin", decode_policy="round_robin")
"""The first request of two pairs goes to the first prefill and the first decode, the second to the others."""


def ids(*engines: SimEngine, path: str = "/v1/completions") -> list[str]:
    """The ids of all requests to ``path`` that these engines received, in their order on each."""
    return [request.headers["X-Request-Id"] for engine in engines for request in engine.received(path)]


def without_kept_connections(proxy: Proxy, engine: SimEngine) -> None:
    """From now on every request to ``engine`` needs a new connection, as after a pause."""
    upstream = proxy.services.upstream
    take = upstream._take
    upstream._take = lambda netloc: None if netloc == engine.http_address else take(netloc)  # type: ignore[method-assign]


def lift_prefill_timeout(proxy: Proxy) -> None:
    """Later requests have time enough, also on a busy machine; those before it had to exceed a short limit."""
    object.__setattr__(proxy.services.config, "prefill_timeout", 60.0)
    connector: Any = proxy.services.coordinator._connectors["p2p_nccl"]
    connector._prefill_timeouts.seconds = 60.0


async def dial_slowly(proxy: Proxy) -> Wire:
    """A connection with small buffers on its way to the client."""
    proxy.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    sock.setblocking(False)
    parts = urlsplit(proxy.url)
    await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
    return Wire(*await asyncio.open_connection(sock=sock, limit=SMALL))


@pytest.fixture(params=[False, True], ids=["direct", "quart"])
def dial_either_way(dial: Dial, request: pytest.FixtureRequest) -> Dial:
    """Connections whose requests are taken off them directly, or go through Quart."""

    async def open_one(url: str) -> Wire:
        wire = await dial(url)
        wire.chunked = request.param
        return wire

    return open_one


@pytest.fixture
async def four(machine: Machine) -> tuple[list[SimEngine], list[SimEngine]]:
    """Two prefills and two decodes."""
    pairs = [await machine.pair(), await machine.pair()]
    return [p for p, _ in pairs], [d for _, d in pairs]


@pytest.fixture
def unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deaths that no lifeline tells of: what requests meet that are a moment faster."""
    monkeypatch.setattr(LivenessConnections, "_on_change", lambda self, instance: None)
