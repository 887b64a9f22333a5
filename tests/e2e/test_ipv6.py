"""IPv6 addresses and host names, for clients, for registration and for the engines."""

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import msgpack
import pytest
import zmq.asyncio

from disagg_proxy.cluster.instance import State
from disagg_proxy.config import StaticInstance
from disagg_sim import SimConfig, SimEngine
from tests.conftest import Proxy, running_proxy, soon
from tests.simulated import REQUESTS, RIGHT, Machine, events, text_of, text_of_events

PATH = "/v1/completions"
ASK = REQUESTS[PATH]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def engines(stack: AsyncExitStack, host: str, zmq: str | None) -> list[SimEngine]:
    started = []
    for role in ("prefill", "decode"):
        started.append(SimEngine(SimConfig(role=role, host=host, proxy=zmq)))
        await started[-1].start()
        stack.push_async_callback(started[-1].stop)
    return started


async def check_right(proxy: Proxy, http) -> None:
    machine = Machine(proxy, AsyncExitStack(), http)
    status, _, body = await machine.post(PATH, ASK)
    assert status == 200 and text_of(body) == RIGHT[PATH], body
    _, _, raw = await machine.send(PATH, {**ASK, "stream": True})
    assert text_of_events(events(raw)) == RIGHT[PATH]


@needs_ipv6
async def test_everything_on_ipv6(stack, http) -> None:
    proxy = await stack.enter_async_context(running_proxy(http_host="::1", zmq_host="::1"))
    assert proxy.url.startswith("http://[::1]:")
    pair = await engines(stack, "::1", f"[::1]:{proxy.services.discovery.listener.port}")
    await soon(proxy.until_pairs())
    await check_right(proxy, http)
    assert all(engine.http_address.startswith("[::1]:") for engine in pair)


@needs_ipv6
@pytest.mark.parametrize("zmq_host", ["::", "0.0.0.0"])
async def test_wildcard_hosts_take_ipv4_engines(stack, http, zmq_host: str) -> None:
    proxy = await stack.enter_async_context(running_proxy(http_host="::", zmq_host=zmq_host))
    port = proxy.socket.getsockname()[1]
    await engines(stack, "127.0.0.1", f"127.0.0.1:{proxy.services.discovery.listener.port}")
    await soon(proxy.until_pairs())
    proxy.url = f"http://[::1]:{port}"
    await check_right(proxy, http)


@needs_ipv6
@pytest.mark.parametrize("brackets", [True, False], ids=["brackets", "as vLLM writes it"])
async def test_an_ipv6_address_in_a_ping_with_and_without_brackets(stack, http, brackets: bool) -> None:
    """vLLM joins host and port with a colon and adds no brackets."""
    proxy = await stack.enter_async_context(running_proxy())
    prefill, decode = await engines(stack, "::1", None)
    context = zmq.asyncio.Context()
    sock = context.socket(zmq.DEALER)
    sock.connect(f"tcp://{proxy.zmq}")
    try:
        for engine, role in ((prefill, "P"), (decode, "D")):
            address = engine.http_address if brackets else engine.http_address.replace("[", "").replace("]", "")
            ping = {"type": role, "http_address": address, "zmq_address": engine.kv_address}
            await sock.send(msgpack.packb(ping))
        await soon(proxy.until_pairs())
    finally:
        context.destroy(linger=0)
    await check_right(proxy, http)
    assert all(i.key.startswith("[::1]:") for i in proxy.services.registry.instances())


async def test_host_names_in_pings_and_in_static_instances(stack, http) -> None:
    prefill, decode = await engines(stack, "127.0.0.1", None)
    named = {engine: engine.http_address.replace("127.0.0.1", "localhost") for engine in (prefill, decode)}
    static = StaticInstance(named[prefill], prefill.kv_address.replace("127.0.0.1", "localhost"))
    proxy = await stack.enter_async_context(running_proxy(prefill=(static,)))
    context = zmq.asyncio.Context()
    sock = context.socket(zmq.DEALER)
    sock.connect(f"tcp://{proxy.zmq}")
    try:
        ping = {"type": "D", "http_address": named[decode], "zmq_address": decode.kv_address}
        await sock.send(msgpack.packb(ping))
        await soon(proxy.until_pairs())
    finally:
        context.destroy(linger=0)
    assert proxy.instance(named[decode]).state is State.READY
    await check_right(proxy, http)
    sent = decode.received(PATH)[0].headers["X-Request-Id"]
    assert sent.startswith(f"___prefill_addr_{static.kv_address}___decode_addr_{decode.kv_address}_")


@pytest.mark.settings(http_host="localhost", zmq_host="localhost")
async def test_the_proxy_itself_listens_on_a_host_name(machine) -> None:
    await machine.pair()
    await check_right(machine.proxy, machine.http)
