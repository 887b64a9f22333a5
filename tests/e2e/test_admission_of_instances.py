"""How instances come and go while the proxy runs: a ping and an HTTP 200 admit, silence and refusal eject, and each
comes back by itself."""

import asyncio
import json
from dataclasses import replace

import msgpack
import pytest
import zmq
import zmq.asyncio

from disagg_proxy.cluster.instance import State
from disagg_proxy.sim import SimConfig, SimEngine
from tests.conftest import soon
from tests.machine import REQUESTS, RIGHT, text_of

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
quick_probes = pytest.mark.settings(probe_interval=0.05)


@pytest.fixture
def history(machine) -> list[tuple[str, State, str]]:
    """Every change of an instance: its address, its new state and why."""
    changes: list[tuple[str, State, str]] = []
    machine.proxy.services.registry.watch(changed=lambda i: changes.append((i.http.text, i.state, i.reason)))
    return changes


async def check_right(machine, model: str = "sim-model") -> None:
    status, _, body = await machine.post(PATH, {**ASK, "model": model})
    assert status == 200, body
    assert text_of(body) == RIGHT[PATH]


async def test_a_ping_alone_admits_nobody_and_http_does_within_a_moment(machine, history) -> None:
    engine = SimEngine(SimConfig(role="prefill", proxy=machine.proxy.zmq, ping_seconds=0.05, startup_seconds=0.3))
    starting = asyncio.create_task(engine.start())
    await soon(machine.proxy.until(lambda: bool(history)))
    await soon(machine.proxy.until(lambda: history[-1][2] == "its HTTP port refuses connections"))
    assert (await machine.get("/health"))[1]["prefill"] == {"ready": 0, "known": 1}
    assert (await machine.get("/v1/models"))[1]["data"] == []
    assert not engine.ready
    await soon(machine.proxy.until_state(engine.http_address, State.READY), 2)
    await starting
    assert (await machine.get("/health"))[1]["prefill"] == {"ready": 1, "known": 1}
    assert [state for _, state, _ in history][-1] is State.READY
    await engine.stop()


@quick_probes
@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (404, b'{"detail": "Not Found"}', "its /v1/models answers 404"),
        (401, b'{"error": "Unauthorized"}', "its /v1/models answers 401: set ENGINE_API_KEY to the instances' key"),
        (500, b"", "its /v1/models answers 500"),
        (200, b"", "its /v1/models is not an OpenAI model list"),
        (200, b"<html>", "its /v1/models is not an OpenAI model list"),
        (200, b"[]", "its /v1/models is not an OpenAI model list"),
        (200, b'{"data": [{"name": "x"}]}', "its /v1/models is not an OpenAI model list"),
        (200, b'{"data": [7]}', "its /v1/models is not an OpenAI model list"),
        (200, b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "its /v1/models is not an OpenAI model list"),
        (200, b'{"data": []}', "its /v1/models lists no model"),
        (200, b'{"data": [{"id": null}]}', "its /v1/models lists no model"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_wrong_model_list_admits_nobody_until_it_is_right(machine, history, status, body, reason) -> None:
    engine = SimEngine(SimConfig(role="decode", proxy=machine.proxy.zmq))
    engine.faults.fail_next(status, body, path="/v1/models", times=2)
    await engine.start()
    await soon(machine.proxy.until_state(engine.http_address, State.READY))
    assert (engine.http_address, State.PROBING, reason) in history
    await engine.stop()


@quick_probes
async def test_health_decides(machine, pair, history) -> None:
    decode = pair[1]
    decode.faults.health_status = 503
    await soon(machine.proxy.until_state(decode.http_address, State.PROBING))
    assert machine.proxy.instance(decode.http_address).reason == "its /health answers 503"
    assert (await machine.get("/health"))[0] == 503 and (await machine.post(PATH, ASK))[0] == 503
    decode.faults.health_status = None
    await soon(machine.proxy.until_state(decode.http_address, State.READY))
    await check_right(machine)


@pytest.mark.settings(instance_expiry=0.7)
async def test_a_missing_ping_ejects_nobody_silence_does_and_the_next_ping_brings_it_back(machine, pair) -> None:
    decode = pair[1]
    there = machine.proxy.instance(decode.http_address)
    decode.faults.pings = False
    await soon(machine.proxy.until(lambda: there.state is not State.READY))
    # Pings come every 0.2 s here: more than one was missing.
    assert there.state is State.LOST and there.changed_at - there.last_ping >= 0.7
    status, body = await machine.get("/health")
    assert status == 503 and body["missing"] == ["no decode instance is ready (one is lost: no ping for 1 s)"]
    (shown,) = [i for i in (await machine.get("/stats"))[1]["instances"] if i["role"] == "decode"]
    assert shown["state"] == "lost" and shown["last_ping_age_s"] >= 0.7
    assert (await machine.post(PATH, ASK))[0] == 503
    decode.faults.pings = True
    await soon(machine.proxy.until_pairs())
    await check_right(machine)


@pytest.mark.settings(probe_interval=60.0)
@pytest.mark.parametrize("role", [0, 1], ids=["prefill", "decode"])
async def test_an_instance_that_was_killed_is_out_when_it_refuses_and_back_when_it_is_back(machine, role) -> None:
    engines = list(await machine.pair())
    spare = await machine.pair()
    engine = engines[role]
    await engine.kill()
    machine.proxy.services.registry.look_again(machine.proxy.instance(engine.http_address))
    await soon(machine.proxy.until_state(engine.http_address, State.PROBING))
    for _ in range(4):
        await check_right(machine)
    assert not engine.received(PATH) and len(spare[role].received(PATH)) == 4
    again = engine.restarted()
    await again.start()
    await soon(machine.proxy.until_state(engine.http_address, State.READY))
    assert machine.proxy.instance(engine.http_address).epoch == 1
    await again.stop()


async def test_a_restarted_instance_is_heard_although_its_old_connection_lives(machine) -> None:
    """Half-open peers: the old process is gone, its TCP connection is not, and the identity is the same."""
    context = zmq.asyncio.Context()
    identity = b"127.0.0.1:21001"

    async def ping(http_port: int) -> zmq.asyncio.Socket:
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.IDENTITY, identity)
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(f"tcp://{machine.proxy.zmq}")
        address = f"127.0.0.1:{http_port}"
        await sock.send(msgpack.packb({"type": "P", "http_address": address, "zmq_address": f"127.0.0.1:{http_port}"}))
        await soon(machine.proxy.until(lambda: machine.proxy.knows(address)))
        return sock

    try:
        sockets = [await ping(port) for port in (1, 2, 3)]
    finally:
        context.destroy(linger=0)
    assert len(sockets) == 3


@quick_probes
async def test_a_restart_with_the_same_addresses_works_as_soon_as_it_is_up(machine, pair) -> None:
    prefill = pair[0]
    await check_right(machine)
    await prefill.kill()
    await soon(machine.proxy.until_state(prefill.http_address, State.PROBING))
    again = prefill.restarted()
    await again.start()
    await soon(machine.proxy.until_state(prefill.http_address, State.READY))
    await check_right(machine)
    assert len(again.received(PATH)) == 1
    await again.stop()


@quick_probes
async def test_an_instance_that_comes_back_with_another_model_serves_that_one(machine, pair) -> None:
    again = []
    for engine in pair:
        await engine.kill()
        await soon(machine.proxy.until_state(engine.http_address, State.PROBING))
        fresh = engine.restarted()
        again.append(SimEngine(replace(fresh.config, models=("new", "alias"))))
        await again[-1].start()
        await soon(machine.proxy.until_state(engine.http_address, State.READY))
    assert [card["id"] for card in (await machine.get("/v1/models"))[1]["data"]] == ["new", "alias"]
    status, _, body = await machine.post(PATH, ASK)
    assert status == 404 and "new" in body["error"]["message"] and "alias" in body["error"]["message"]
    await check_right(machine, "alias")
    for engine in again:
        await engine.stop()


@quick_probes
async def test_a_model_that_is_loaded_while_the_instance_runs_is_noticed(machine, pair) -> None:
    cards = json.dumps({"object": "list", "data": [{"id": "lora-1"}, {"id": "sim-model"}]})
    for engine in pair:
        engine.faults.fail_next(200, cards, path="/v1/models", times=1000)
    registry = machine.proxy.services.registry
    await soon(machine.proxy.until(lambda: all("lora-1" in i.models for i in registry.instances())))
    assert {card["id"] for card in (await machine.get("/v1/models"))[1]["data"]} == {"lora-1", "sim-model"}
    await check_right(machine)


async def test_prefill_and_decode_of_different_models_are_no_pair(machine) -> None:
    prefill, decode = await machine.engine("prefill", models=("a",)), await machine.engine("decode", models=("b",))
    for engine in (prefill, decode):
        await soon(machine.proxy.until_state(engine.http_address, State.READY))
    status, health = await machine.get("/health")
    assert status == 503 and health["missing"] == ["no prefill and decode instance serve the same model"]
    for model, role in (("a", "decode"), ("b", "prefill")):
        status, _, body = await machine.post(PATH, {**ASK, "model": model})
        assert status == 503 and f"no ready {role} instance that serves '{model}'" in body["error"]["message"]
    no_model = {name: value for name, value in ASK.items() if name != "model"}
    status, _, body = await machine.post(PATH, no_model)
    assert status == 503 and "same default model" in body["error"]["message"]
    assert not prefill.received(PATH) and not decode.received(PATH)


async def test_each_model_is_served_by_its_own_pair(machine) -> None:
    pairs = {model: await machine.pair(models=(model, "both")) for model in ("a", "b")}
    for _ in range(3):
        for model in pairs:
            await check_right(machine, model)
    for model, engines in pairs.items():
        for engine in engines:
            assert [request.json["model"] for request in engine.received(PATH)] == [model] * 3


async def test_a_ping_that_contradicts_a_live_instance_does_not_displace_it(machine, pair) -> None:
    prefill, decode = pair
    context = zmq.asyncio.Context()
    sock = context.socket(zmq.DEALER)
    sock.connect(f"tcp://{machine.proxy.zmq}")
    claims = [
        {"type": "D", "http_address": prefill.http_address, "zmq_address": prefill.kv_address},
        {"type": "P", "http_address": prefill.http_address, "zmq_address": "127.0.0.1:1"},
        {"type": "D", "http_address": "127.0.0.1:2", "zmq_address": decode.kv_address},
    ]
    try:
        for claim in claims:
            await sock.send(msgpack.packb(claim))
        await sock.send(msgpack.packb({"type": "P", "http_address": "127.0.0.1:3", "zmq_address": "127.0.0.1:4"}))
        await soon(machine.proxy.until(lambda: machine.proxy.knows("127.0.0.1:3")))
    finally:
        context.destroy(linger=0)
    assert not machine.proxy.knows("127.0.0.1:2")
    assert machine.proxy.services.pairing.ready_pairs() == 1
    refused = (await machine.get("/stats"))[1]["discovery"]["refused"]
    assert refused == {prefill.http_address: 2, "127.0.0.1:2": 1}
    await check_right(machine)
