"""Instances named by --prefill and --decode, and engines that ask for a key."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from disagg_proxy.cluster.instance import Source, State
from disagg_proxy.config import StaticInstance
from disagg_sim import SimConfig, SimEngine
from tests.conftest import Proxy, running_proxy, soon
from tests.simulated import REQUESTS, RIGHT, Machine, text_of

PATH = "/v1/completions"
ASK = REQUESTS[PATH]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def silent_pair(stack: AsyncExitStack, **knobs: Any) -> tuple[SimEngine, SimEngine]:
    """Engines that ping nobody."""
    engines = SimEngine(SimConfig(role="prefill", **knobs)), SimEngine(SimConfig(role="decode", **knobs))
    for engine in engines:
        await engine.start()
        stack.push_async_callback(engine.stop)
    return engines


def named(engine: SimEngine, kv: bool = True) -> tuple[StaticInstance, ...]:
    return (StaticInstance(engine.http_address, engine.kv_address if kv else None),)


async def start_proxy(stack: AsyncExitStack, **settings: Any) -> Proxy:
    return await stack.enter_async_context(running_proxy(**settings))


async def check_right(proxy: Proxy, http) -> None:
    status, _, body = await Machine(proxy, AsyncExitStack(), http).post(PATH, ASK)
    assert status == 200 and text_of(body) == RIGHT[PATH]


async def test_static_instances_serve_without_a_ping_and_do_not_expire(stack, http) -> None:
    prefill, decode = await silent_pair(stack)
    proxy = await start_proxy(stack, prefill=named(prefill), decode=named(decode), instance_expiry=0.01)
    await soon(proxy.until_pairs())
    proxy.services.registry.expire()
    await check_right(proxy, http)
    async with http.get(proxy.url + "/stats") as answer:
        shown = (await answer.json())["instances"]
    assert [(i["role"], i["source"], i["last_ping_age_s"], i["state"]) for i in shown] == [
        ("prefill", "static", None, "ready"),
        ("decode", "static", None, "ready"),
    ]


async def test_without_a_kv_address_an_instance_waits_for_its_own_ping_to_tell(stack, http) -> None:
    prefill, decode = await silent_pair(stack)
    proxy = await start_proxy(stack, prefill=named(prefill, kv=False), decode=named(decode))
    there = proxy.instance(prefill.http_address)
    await soon(proxy.until(lambda: "its KV address is unknown" in there.reason))
    assert there.state is State.PROBING and "URL,KV_ADDRESS" in there.reason
    await prefill.stop()
    pinging = SimEngine(
        SimConfig(
            role="prefill",
            port=int(prefill.http_address.rpartition(":")[2]),
            kv_port=int(prefill.kv_address.rpartition(":")[2]),
            proxy=proxy.zmq,
        )
    )
    await pinging.start()
    stack.push_async_callback(pinging.stop)
    await soon(proxy.until_pairs())
    assert (there.source, there.kv.text) == (Source.STATIC, prefill.kv_address)
    await check_right(proxy, http)


async def test_a_static_instance_that_is_not_up_yet_is_admitted_when_it_is(stack, http) -> None:
    prefill, decode = await silent_pair(stack)
    await prefill.stop()
    proxy = await start_proxy(stack, prefill=named(prefill), decode=named(decode))
    await soon(proxy.until(lambda: proxy.instance(prefill.http_address).reason == "its HTTP port refuses connections"))
    again = prefill.restarted()
    await again.start()
    stack.push_async_callback(again.stop)
    await soon(proxy.until_pairs())
    await check_right(proxy, http)


async def test_pings_of_a_static_instance_change_nothing(stack, http) -> None:
    engines = []
    for role in ("prefill", "decode"):
        engines.append(SimEngine(SimConfig(role=role)))
        await engines[-1].start()
        await engines[-1].stop()
    proxy = await start_proxy(stack, prefill=named(engines[0]), decode=named(engines[1]))
    for old in engines:
        http_port, kv_port = (int(address.rpartition(":")[2]) for address in (old.http_address, old.kv_address))
        engine = SimEngine(SimConfig(role=old.config.role, port=http_port, kv_port=kv_port, proxy=proxy.zmq))
        await engine.start()
        stack.push_async_callback(engine.stop)
    await soon(proxy.until_pairs())
    assert len(proxy.services.registry.instances()) == 2
    assert all(i.source is Source.STATIC for i in proxy.services.registry.instances())
    await check_right(proxy, http)


async def test_engines_that_ask_for_a_key_get_the_one_of_engine_api_key(stack, http) -> None:
    prefill, decode = await silent_pair(stack, api_key="sk-engine")
    proxy = await start_proxy(stack, prefill=named(prefill), decode=named(decode), engine_api_key="sk-engine")
    await soon(proxy.until_pairs())
    await check_right(proxy, http)
    for engine in (prefill, decode):
        paths = {r.path for r in engine.requests if r.headers.get("Authorization") == "Bearer sk-engine"}
        assert paths == {"/health", "/v1/models", PATH}


@pytest.mark.parametrize("key", ["", "sk-other"], ids=["no key", "another key"])
async def test_without_the_engines_key_the_reason_names_the_setting(stack, http, key: str) -> None:
    prefill, decode = await silent_pair(stack, api_key="sk-engine")
    proxy = await start_proxy(stack, prefill=named(prefill), decode=named(decode), engine_api_key=key)
    wanted = "its /v1/models answers 401: set ENGINE_API_KEY to the instances' key"
    await soon(proxy.until(lambda: all(i.reason == wanted for i in proxy.services.registry.instances())))
    assert not proxy.services.selection.ready_pairs()
