"""Engines with NixlConnector: prefill first, its answer's params to decode, which computes what it cannot read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from disagg_proxy.cluster.instance import State
from disagg_proxy.config import StaticInstance
from disagg_proxy.connectors.p2p_nccl import KIND as P2P
from disagg_sim import SimConfig, SimEngine, expected_text
from tests.conftest import Wire, running_proxy, soon
from tests.e2e.together import (
    ASK,
    COMPLETIONS,
    PROMPT,
    REQUESTS,
    RESPONSES,
    RIGHT,
    ROUTES,
    TOKENS,
    asked,
    clean,
    computed,
    external,
    right,
    settings,
    transfers,
)
from tests.simulated import Machine, text_of, text_of_events

NIXL = {"connector": "nixl"}


async def started(stack: AsyncExitStack, role: str, **knobs: Any) -> SimEngine:
    engine = SimEngine(SimConfig(role=role, **{**NIXL, **knobs}))
    await engine.start()

    async def stop() -> None:
        # asyncio leaves a connection open that comes while its server closes (Python 3.11): a last probe's is taken in.
        for _ in range(5):
            await asyncio.sleep(0)
        await engine.stop()

    stack.push_async_callback(stop)
    return engine


def named(*engines: SimEngine) -> tuple[StaticInstance, ...]:
    return tuple(StaticInstance(engine.http_address, protocol="nixl") for engine in engines)


@pytest.fixture
async def pair() -> AsyncIterator[tuple[SimEngine, SimEngine]]:
    async with AsyncExitStack() as stack:
        yield await started(stack, "prefill"), await started(stack, "decode")


@pytest.fixture
async def machine(
    http: aiohttp.ClientSession, request: pytest.FixtureRequest, pair: tuple[SimEngine, SimEngine]
) -> AsyncIterator[Machine]:
    mark = request.node.get_closest_marker("settings")
    settings = {"prefill": named(pair[0]), "decode": named(pair[1]), **(mark.kwargs if mark else {})}
    async with running_proxy(**settings) as proxy, AsyncExitStack() as stack:
        await soon(proxy.until_pairs())
        yield Machine(proxy, stack, http)


# -- answers


@ROUTES
@pytest.mark.parametrize("stream", [False, True])
async def test_every_route(machine: Machine, pair, path: str, stream: bool) -> None:
    prefill, decode = pair
    if stream:
        assert text_of_events(await machine.stream(path, REQUESTS[path])) == RIGHT[path]
    else:
        _status, _, answer = await machine.post(path, REQUESTS[path])
        assert text_of(answer) == RIGHT[path] and not answer.get("kv_transfer_params")
    assert external(decode) >= TOKENS - 1 and computed(decode) == 1
    (to_prefill,), (to_decode,) = transfers(prefill, path), transfers(decode, path)
    assert to_prefill["do_remote_decode"] is True
    assert prefill.received(path)[0].json["max_output_tokens" if path == RESPONSES else "max_tokens"] == 1
    assert to_decode["do_remote_prefill"] is True and to_decode["remote_port"] == int(
        prefill.kv_address.rpartition(":")[2]
    )
    assert prefill.state()["kv_reads"] == 1
    await clean(machine, prefill, decode)


async def test_decode_is_asked_when_prefill_has_answered(machine: Machine, pair) -> None:
    prefill, decode = pair
    prefill.faults.hold("answer")
    answer = await asked(machine)
    await soon(prefill.wait_until(lambda s: s["held_at"] == "answer"))
    assert not decode.received(COMPLETIONS)
    prefill.faults.release()
    await right(answer)
    await clean(machine, *pair)
    await soon(machine.proxy.until_idle())
    (record,) = machine.proxy.services.event_log.records
    assert record.prefill_sent < record.prefill_done <= record.decode_sent, "its times say so too"


@pytest.mark.parametrize("changes", [{"prompt": [PROMPT, f"{PROMPT} and more"]}, {"n": 2, "temperature": 1.0}])
async def test_what_is_more_than_one_engine_request_is_decodes_alone(machine: Machine, pair, changes: Any) -> None:
    prompts = changes.get("prompt", [PROMPT])
    wanted = [expected_text(prompt, 8, index=index) for prompt in prompts for index in range(changes.get("n", 1))]
    status, _, answer = await machine.post(COMPLETIONS, {**ASK, **changes})
    assert status == 200 and [choice["text"] for choice in answer["choices"]] == wanted
    assert not pair[0].received(COMPLETIONS) and transfers(pair[1]) == [None]
    await clean(machine, *pair)


async def test_forced_tool_calls_come_with_params(machine: Machine, pair) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    path = "/v1/chat/completions"
    body = {**REQUESTS[path], "tools": [tool], "tool_choice": "required", "max_tokens": 60}
    status, _, answer = await machine.post(path, body)
    assert status == 200 and answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look_up"
    assert pair[0].state()["kv_reads"] == 1
    await clean(machine, *pair)


async def test_clients_cannot_steer_the_transfer(machine: Machine, pair) -> None:
    await right(machine.post(COMPLETIONS, {**ASK, "kv_transfer_params": {"do_remote_prefill": True}}))
    assert external(pair[1]) > 0
    await clean(machine, *pair)


# -- prefill fails


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["400", "500", "502", "reset", "close"])
async def test_a_prefill_that_fails_costs_the_client_nothing(machine: Machine, pair, how: str, stream: bool) -> None:
    prefill, decode = pair
    if how.isdigit():
        prefill.faults.fail_next(int(how), b"no", path=COMPLETIONS)
    else:
        (prefill.faults.reset_next if how == "reset" else prefill.faults.close_next)(path=COMPLETIONS, times=2)
    if stream:
        assert text_of_events(await soon(machine.stream(COMPLETIONS, ASK))) == RIGHT[COMPLETIONS]
    else:
        await right(machine.post(COMPLETIONS, ASK))
    assert external(decode) == 0 and transfers(decode) == [None]
    await clean(machine, prefill, decode)


@pytest.mark.parametrize("params", [
    None, {}, {"do_remote_prefill": True}, {"do_remote_prefill": True, "remote_block_ids": [[1]]}, [], "x",
])  # fmt: skip
async def test_params_that_are_not_whole_do_not_end_decode(machine: Machine, pair, params: Any) -> None:
    prefill, decode = pair
    body = json.dumps({"choices": [], "kv_transfer_params": params}).encode()
    prefill.faults.fail_next(200, body, path=COMPLETIONS)
    await right(machine.post(COMPLETIONS, ASK))
    assert transfers(decode) == [None] and decode.state()["dead"] is None
    assert machine.proxy.instance(prefill.http_address).kv_missing == 1
    await clean(machine, *pair)


@settings(prefill_timeout=0.2)
async def test_a_prefill_that_says_nothing(machine: Machine, pair) -> None:
    pair[0].faults.hang_next(path=COMPLETIONS)
    await right(machine.post(COMPLETIONS, ASK))
    await clean(machine, *pair)


@settings(freeze_after_min=0.1, freeze_after_max=0.4)
async def test_a_frozen_prefill(machine: Machine, pair) -> None:
    prefill, decode = pair
    prefill.faults.hold("forward")
    await right(machine.post(COMPLETIONS, ASK))
    assert machine.proxy.instance(prefill.http_address).freezes == 1
    assert machine.proxy.instance(decode.http_address).freezes == 0


@pytest.mark.parametrize("when", ["during", "between"])
async def test_a_prefill_that_is_killed(machine: Machine, pair, when: str) -> None:
    """Also when its KV was promised: decode cannot read it and computes."""
    prefill, decode = pair
    engine = prefill if when == "during" else decode
    engine.faults.hold("forward" if when == "during" else "schedule")
    answer = await asked(machine)
    await soon(engine.wait_until(lambda s: s["held_at"] is not None))
    await prefill.kill()
    engine.faults.release()
    await right(answer)
    assert external(decode) == 0
    await clean(machine, decode)


async def test_without_prefill_decode_serves_alone_and_prefill_comes_back(machine: Machine, pair) -> None:
    prefill, _decode = pair
    await prefill.kill()
    await right(machine.post(COMPLETIONS, ASK))
    await soon(machine.proxy.until_state(prefill.http_address, State.PROBING))
    again = prefill.restarted()
    await again.start()
    try:
        await soon(machine.proxy.until_state(prefill.http_address, State.READY))
        await right(machine.post(COMPLETIONS, ASK))
        assert again.state()["kv_reads"] == 1
    finally:
        await again.stop()


# -- decode fails


@pytest.mark.parametrize("how", ["500", "reset", "refuse"])
async def test_another_decode_gets_kv_of_its_own(http: aiohttp.ClientSession, how: str) -> None:
    """The first one may have read the first prefill's KV, and nobody may read it twice."""
    async with AsyncExitStack() as stack:
        prefill = await started(stack, "prefill")
        decodes = [await started(stack, "decode") for _ in range(2)]
        turns = {"decode_policy": "round_robin", "probe_interval": 60.0}
        proxy = await stack.enter_async_context(running_proxy(prefill=named(prefill), decode=named(*decodes), **turns))
        await soon(proxy.until_pairs(2))
        machine = Machine(proxy, stack, http)
        for decode in decodes[:1]:
            if how == "500":
                decode.faults.fail_next(500, b"no", path=COMPLETIONS)
            elif how == "reset":
                decode.faults.reset_next(path=COMPLETIONS, times=2)
            else:
                await decode.kill()
        for _ in range(2):
            await right(machine.post(COMPLETIONS, ASK))
        ids = [params["remote_request_id"] for engine in decodes for params in transfers(engine) if params]
        assert len(ids) == len(set(ids)) >= 2
        assert external(decodes[1]) > 0


async def test_a_decode_that_may_have_the_params_is_asked_again_without(machine: Machine, pair) -> None:
    """A kept connection that is reset says nothing of what the other side has done."""
    prefill, decode = pair
    await right(machine.post(COMPLETIONS, ASK))
    decode.faults.reset_next(path=COMPLETIONS)
    await right(machine.post(COMPLETIONS, ASK))
    assert [params is None for params in transfers(decode)] == [False, False, True]
    assert prefill.state()["kv_reads"] == 1


# -- clients that leave


@pytest.mark.parametrize("when", ["prefill", "between", "decode"])
async def test_a_client_that_leaves_leaves_nothing(
    machine: Machine, pair, dial: Callable[[str], Any], when: str
) -> None:
    """An aborted prefill frees its KV, and so does a decode that is aborted before it has read."""
    prefill, decode = pair
    engine, point = {"prefill": (prefill, "schedule"), "between": (decode, "schedule"), "decode": (decode, "answer")}[
        when
    ]
    engine.faults.hold(point)
    client: Wire = await dial(machine.proxy.url)
    client.post(COMPLETIONS, {**ASK, "max_tokens": 200})
    await soon(engine.wait_until(lambda s: s["held_at"] == point))
    await machine.left(client)
    await soon(engine.wait_until(lambda s: s["aborting"] == 1))
    engine.faults.release()
    await clean(machine, prefill, decode)
    await right(machine.post(COMPLETIONS, ASK))


async def test_kv_that_nobody_reads_expires(http: aiohttp.ClientSession) -> None:
    async with AsyncExitStack() as stack:
        prefill = await started(stack, "prefill", hold_timeout=0.05)
        decode = await started(stack, "decode")
        proxy = await stack.enter_async_context(running_proxy(prefill=named(prefill), decode=named(decode)))
        await soon(proxy.until_pairs())
        await right(Machine(proxy, stack, http).post(COMPLETIONS, ASK))
        decode.faults.fail_next(400, b'{"error": {"message": "no"}}', path=COMPLETIONS)
        status, _, _ = await Machine(proxy, stack, http).post(COMPLETIONS, ASK)
        assert status == 400
        await soon(prefill.wait_until(lambda s: not s["kv_waiting"] and not s["running"]))
        assert proxy.services.stats.kv_releases.started == 0


# -- pairs


async def test_kinds_do_not_mix(http: aiohttp.ClientSession) -> None:
    async with AsyncExitStack() as stack:
        prefill = await started(stack, "prefill", connector="p2p_nccl")
        decode = await started(stack, "decode")
        first = (StaticInstance(prefill.http_address, prefill.kv_address),)
        proxy = await stack.enter_async_context(running_proxy(prefill=first, decode=named(decode), decode_alone=False))
        await soon(proxy.until_state(prefill.http_address, State.READY))
        await soon(proxy.until_state(decode.http_address, State.READY))
        status, _, body = await Machine(proxy, stack, http).post(COMPLETIONS, ASK)
        assert status == 503 and "prefill speaks p2p_nccl, decode nixl" in body["error"]["message"]


async def test_a_ping_does_not_make_it_another_kind(machine: Machine, pair) -> None:
    registry = machine.proxy.services.registry
    there = machine.proxy.instance(pair[0].http_address)
    before = pair[0].state()["http_requests"]
    refused = registry.announce(there.role, there.http, there.http, P2P)
    await soon(pair[0].wait_until(lambda s: s["http_requests"] >= before + 2))
    assert refused is not None and there.kind.protocol == "nixl" and there.kv is None
