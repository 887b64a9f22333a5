"""Faults of an engine that serves a request alone, of either role, and of ways that change, with PLACEMENT=elastic."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aiohttp
import pytest

from disagg_proxy.cluster.choice import Way
from disagg_proxy.cluster.instance import State
from disagg_sim import SimEngine
from tests.conftest import running_proxy, soon
from tests.e2e.together import OWN
from tests.faults.test_mid_stream import read_until_cut
from tests.placed import ALONE, dictate
from tests.simulated import REQUESTS, RIGHT, Machine, check_error, text_of, text_of_events

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
BUSY = b'{"error": {"message": "The engine is currently busy.", "type": "Service Unavailable", "code": 503}}'
REFUSAL = b'{"error": {"message": "slow down", "type": "BadRequestError", "param": "top_k", "code": 418}}'
ELASTIC = {"placement": "elastic", "prefill_policy": "round_robin", "decode_policy": "round_robin"}


@pytest.fixture
async def machine(http: aiohttp.ClientSession, request: pytest.FixtureRequest) -> AsyncIterator[Machine]:
    """That of tests/simulated.py, with PLACEMENT=elastic."""
    mark = request.node.get_closest_marker("settings")
    settings = {**ELASTIC, **(mark.kwargs if mark else {})}
    async with running_proxy(**settings) as proxy, AsyncExitStack() as stack:
        yield Machine(proxy, stack, http)


@pytest.fixture(params=ALONE, ids=lambda way: way.value)
async def engines(machine: Machine, request: pytest.FixtureRequest) -> tuple[SimEngine, SimEngine]:
    """Two engines of the role that serves alone: the first gets the first request. There are two pairs."""
    pairs = [await machine.pair(**OWN), await machine.pair(**OWN)]
    dictate(machine.proxy, request.param)
    role = request.param is Way.DECODE_ALONE
    return pairs[0][role], pairs[1][role]


async def ask(machine: Machine, stream: bool) -> str:
    if stream:
        return text_of_events(await soon(machine.stream(PATH, ASK)))
    status, _, body = await soon(machine.post(PATH, ASK))
    assert status == 200, body
    return text_of(body)


async def clean(machine: Machine, *engines: SimEngine) -> None:
    await soon(machine.proxy.until_idle())
    await machine.unharmed(*engines)
    for i in machine.proxy.services.registry.instances():
        counts = (i.in_flight, i.answering, i.decoding, i.computing_tokens, i.tokens_in_flight, i.kv_committed)
        assert counts == (0,) * 6, i


streams = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@streams
async def test_another_engine_serves_what_a_killed_one_had_not_begun(machine: Machine, engines, stream: bool) -> None:
    first, second = engines
    first.faults.hold("schedule")
    asked = asyncio.ensure_future(ask(machine, stream))
    await soon(first.wait_until(lambda s: s["held_at"] == "schedule"))
    await machine.kill(first)
    assert await soon(asked) == RIGHT[PATH]
    assert not second.received(PATH) or len(second.received(PATH)) == 1
    await clean(machine, second)


@streams
async def test_another_engine_serves_where_one_fails(machine: Machine, engines, stream: bool) -> None:
    engines[0].faults.fail_next(500, b"{}", path=PATH)
    assert await ask(machine, stream) == RIGHT[PATH]
    assert machine.proxy.services.stats.failovers == 1
    await clean(machine, *engines)


@streams
@pytest.mark.parametrize("status", [429, 503])
async def test_another_engine_serves_where_one_is_busy(machine: Machine, engines, stream: bool, status: int) -> None:
    engines[0].faults.fail_next(status, BUSY, path=PATH)
    assert await ask(machine, stream) == RIGHT[PATH]
    there = machine.proxy.instance(engines[0].http_address)
    assert (there.rejections_total, there.failures_total) == (1, 0)
    await clean(machine, *engines)


@streams
async def test_a_refusal_is_the_clients(machine: Machine, engines, stream: bool) -> None:
    engines[0].faults.fail_next(422, REFUSAL, path=PATH)
    status, _, raw = await machine.send(PATH, {**ASK, "stream": stream})
    assert (status, raw) == (422, REFUSAL) and not engines[1].received(PATH)
    await clean(machine, *engines)


async def test_a_break_in_mid_stream_is_a_cut(machine: Machine, engines) -> None:
    engines[0].faults.cut_stream_after(3)
    async with machine.http.post(machine.proxy.url + PATH, json={**ASK, "stream": True}) as answer:
        assert b"data:" in await read_until_cut(answer)
    await soon(machine.proxy.until_idle())
    assert machine.proxy.services.stats.outcomes == {"cut": 1}
    assert machine.proxy.instance(engines[0].http_address).failures_total == 1
    await clean(machine, *engines)


@pytest.mark.parametrize("moment", ["before", "during"])
async def test_a_client_that_leaves_frees_everything(machine: Machine, engines, dial, moment: str) -> None:
    engine = engines[0]
    engine.faults.hold("schedule", after=0 if moment == "before" else 3)
    client = await dial(machine.proxy.url)
    client.post(PATH, {**ASK, "stream": True})
    if moment == "during":
        await client.head()
    await soon(engine.wait_until(lambda s: s["held_at"] == "schedule"))
    await machine.left(client)
    engine.faults.release()
    await clean(machine, *engines)


@pytest.mark.settings(freeze_after_min=0.1, freeze_after_max=0.4)
@streams
async def test_a_frozen_engine_is_replaced(machine: Machine, engines, stream: bool) -> None:
    first, second = engines
    with first.faults.held("forward"):
        assert await ask(machine, stream) == RIGHT[PATH]
        there = machine.proxy.instance(first.http_address)
        assert there.state is State.FROZEN and there.freezes == 1
    await soon(machine.proxy.until_state(first.http_address, State.READY))
    await clean(machine, first, second)


async def test_a_stream_goes_on_where_only_the_pings_stop(machine: Machine, engines) -> None:
    """As on a decode: its answers end with their connections, not with its registration."""
    engine = engines[0]
    engine.faults.hold("schedule", after=3)
    asked = asyncio.ensure_future(ask(machine, True))
    await soon(engine.wait_until(lambda s: s["held_at"] == "schedule"))
    registry, there = machine.proxy.services.registry, machine.proxy.instance(engine.http_address)
    engine.faults.pings = False
    there.last_ping = registry.now() - 1000.0
    registry.expire()
    assert there.state is State.LOST
    engine.faults.release()
    assert await soon(asked) == RIGHT[PATH]
    await soon(machine.proxy.until_idle())


async def test_where_every_decode_fails_a_prefill_serves(machine: Machine) -> None:
    prefill, decode = await machine.pair(**OWN)
    decode.faults.fail_next(502, b"broken", path=PATH, times=9)
    assert await ask(machine, False) == RIGHT[PATH]
    assert machine.proxy.services.stats.failovers == 1
    assert [r.json.get("kv_transfer_params") for r in prefill.received(PATH)][-1] is None
    await clean(machine, prefill, decode)


@pytest.mark.parametrize("way", ALONE, ids=lambda way: way.value)
async def test_messages_name_the_role(machine: Machine, way: Way) -> None:
    prefill, decode = await machine.pair(**OWN)
    dictate(machine.proxy, way)
    engine, role = (prefill, "prefill") if way is Way.PREFILL_ALONE else (decode, "decode")
    object.__setattr__(machine.proxy.services.config, "max_tries", 1)
    engine.faults.fail_next(500, b"{}", path=PATH)
    message = check_error(*await machine.send(PATH, ASK), 502, "engine_failed")
    assert message.startswith(f"The {role} instance failed with status 500")
    engine.faults.cut_stream_after(0)
    check_error(*await machine.send(PATH, {**ASK, "stream": True}), 502, "engine_disconnected")
    await clean(machine, prefill, decode)


async def test_a_drained_engine_finishes_what_it_serves_alone(machine: Machine, engines) -> None:
    engine = engines[0]
    engine.faults.hold("schedule", after=3)
    asked = asyncio.ensure_future(ask(machine, True))
    await soon(engine.wait_until(lambda s: s["held_at"] == "schedule"))
    there = machine.proxy.instance(engine.http_address)
    machine.proxy.services.registry.drain(there)
    assert not machine.proxy.services.idle(there)
    await machine.check_right()
    assert len(engine.received(PATH)) == 1
    engine.faults.release()
    assert await soon(asked) == RIGHT[PATH]
    await clean(machine, *engines)
    assert machine.proxy.services.idle(there)


async def test_mixed_ways_while_engines_die_and_clients_leave(machine: Machine, dial) -> None:
    """Whatever happens meanwhile, each answer is right or an error, and nothing is left over."""
    pairs = [await machine.pair(**OWN), await machine.pair(**OWN)]
    ways = list(Way)

    async def one(number: int) -> int:
        dictate(machine.proxy, ways[number % 3])
        if number % 10 == 3:
            client = await dial(machine.proxy.url)
            client.post(PATH, {**ASK, "stream": True})
            await asyncio.sleep(0)
            client.leave()
            return 0
        status, _, raw = await soon(machine.send(PATH, {**ASK, "prompt": f"San Francisco is {number}"}))
        assert status in (200, 502, 503), raw
        return status

    asked = [asyncio.ensure_future(one(number)) for number in range(60)]
    await soon(pairs[0][0].wait_until(lambda s: len(pairs[0][0].received(PATH)) > 3))
    await machine.kill(pairs[0][0])
    found = await asyncio.gather(*asked)
    assert found.count(200) >= 40
    json.dumps(machine.proxy.services.placement_report())
    await clean(machine, pairs[0][1], *pairs[1])
