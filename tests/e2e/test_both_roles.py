"""Engines with ``kv_role`` ``kv_both``: each prefills for others and decodes."""

from __future__ import annotations

import asyncio

import msgpack

from disagg_kv import PROTOCOL_NAME
from disagg_proxy.cluster.instance import Role, State
from disagg_proxy.cluster.kv_compatibility import SELF
from disagg_proxy.discovery.announcement import decode as decode_ping
from disagg_sim import SimEngine, expected_text
from disagg_sim.connectors.disagg_kv_wire import announcement
from tests.conftest import soon
from tests.e2e.together import ASK, COMPLETIONS, OWN, clean, external, in_turn, right, transfers
from tests.simulated import Machine, text_of

BOTH = {**OWN, "kv_both": True}


async def two(machine: Machine, **knobs: object) -> tuple[SimEngine, SimEngine]:
    engines = await machine.engine("decode", **BOTH, **knobs), await machine.engine("decode", **BOTH, **knobs)
    await soon(machine.proxy.until_pairs(2))
    return engines


async def test_older_proxies_take_it_for_a_decode(machine: Machine) -> None:
    engine = await machine.engine("decode", **BOTH)
    sent = {"type": "D", "http_address": engine.http_address, "zmq_address": engine.kv_address,
            **announcement(engine.config, "b")}  # fmt: skip
    assert sent["protocol"] == PROTOCOL_NAME and sent["roles"] == ["prefill", "decode"]
    found = decode_ping([msgpack.dumps(sent)])
    assert found.role is Role.DECODE and found.kind.both_roles
    one_role = decode_ping([msgpack.dumps({**sent, "roles": ["decode"]})])
    assert one_role.role is Role.DECODE and not one_role.kind.both_roles


@in_turn
async def test_each_prefills_for_the_other(machine: Machine) -> None:
    engines = await two(machine)
    prompts = [f"{ASK['prompt']} number {number}" for number in range(8)]
    answers = [await soon(machine.post(COMPLETIONS, {**ASK, "prompt": prompt})) for prompt in prompts]
    assert [text_of(body) for _, _, body in answers] == [expected_text(prompt, 8) for prompt in prompts]
    assert all(external(engine) > 0 for engine in engines)
    addresses = {engine.kv_address: engine for engine in engines}
    for engine in engines:
        fetched = [params["from"] for params in transfers(engine) if "from" in params]
        assert fetched and all(addresses[address] is not engine for address in fetched), "never from itself"
    await clean(machine, *engines)


@in_turn
async def test_many_that_cross_at_once(machine: Machine) -> None:
    engines = await two(machine, max_num_seqs=4, load_timeout=30.0)
    prompts = [f"{ASK['prompt']} number {number}" for number in range(64)]
    answers = await asyncio.gather(*(soon(machine.post(COMPLETIONS, {**ASK, "prompt": p})) for p in prompts))
    assert [text_of(body) for _, _, body in answers] == [expected_text(prompt, 8) for prompt in prompts]
    await clean(machine, *engines)


async def test_alone_it_serves_without_a_pair(machine: Machine) -> None:
    engine = await machine.engine("decode", **BOTH)
    await soon(machine.proxy.until_state(engine.http_address, State.READY))
    await right(machine.post(COMPLETIONS, ASK))
    assert transfers(engine) == [None]
    status, health = await machine.get("/health")
    assert (status, health["pairs"], health["decodes_that_serve_alone"]) == (200, 0, 1)
    assert health["prefill"] == health["decode"] == {"ready": 1, "known": 1}
    known = machine.proxy.instance(engine.http_address)
    assert machine.proxy.services.registry.kv_compatibility.why_not(known, known) == SELF
    await clean(machine, engine)


async def test_beside_engines_of_one_role(machine: Machine) -> None:
    prefill, decode = await machine.pair(**OWN)
    both = await machine.engine("decode", **BOTH)
    await soon(machine.proxy.until_pairs(3))
    status, stats = await machine.get("/stats")
    roles = {one["http_address"]: one["roles"] for one in stats["instances"]}
    assert status == 200 and roles == {
        prefill.http_address: ["prefill"],
        decode.http_address: ["decode"],
        both.http_address: ["prefill", "decode"],
    }
    assert len(stats["instances"]) == 3, "one instance, two roles"
    assert not any(one["cannot_exchange_because"] for one in stats["instances"])
    await right(machine.post(COMPLETIONS, ASK))
    await clean(machine, prefill, decode, both)


@in_turn
async def test_one_that_dies_takes_only_its_own_streams(machine: Machine) -> None:
    first, second = await two(machine)
    await machine.kill(first)
    await right(machine.post(COMPLETIONS, ASK))
    assert transfers(second)[-1] is None
    await machine.restart(first)
    await soon(machine.proxy.until_pairs(2))
    await right(machine.post(COMPLETIONS, ASK))


async def test_a_drained_one_gets_neither_kind_of_leg(machine: Machine) -> None:
    first, second = await two(machine)
    services = machine.proxy.services
    services.registry.drain(machine.proxy.instance(first.http_address))
    assert services.selection.ready_pairs() == 0
    await right(machine.post(COMPLETIONS, ASK))
    assert not first.received(COMPLETIONS) and transfers(second) == [None]
