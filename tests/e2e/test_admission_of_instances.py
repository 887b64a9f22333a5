"""How instances come and go while the proxy runs: a ping and an HTTP 200 admit, silence and refusal eject, and each
comes back by itself."""

import asyncio
import json

import pytest

from disagg_proxy.cluster.instance import State
from disagg_sim import SimConfig, SimEngine
from tests.conftest import soon
from tests.simulated import REQUESTS

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
quick_probes = pytest.mark.settings(probe_interval=0.05)


@pytest.fixture
def history(machine) -> list[tuple[str, State, str]]:
    """Every change of an instance: its address, its new state and why."""
    changes: list[tuple[str, State, str]] = []
    machine.proxy.services.registry.watch(changed=lambda i: changes.append((i.http.text, i.state, i.reason)))
    return changes


async def test_a_ping_alone_admits_nobody_and_http_does_within_a_moment(machine, history) -> None:
    engine = SimEngine(SimConfig(role="prefill", proxy=machine.proxy.zmq, ping_seconds=0.05, startup_seconds=0.3))
    starting = asyncio.create_task(engine.start())
    await soon(machine.proxy.until(lambda: bool(history)))
    await soon(machine.proxy.until(lambda: history[-1][2] == "its HTTP port refuses connections"))
    assert (await machine.get("/health"))[1]["prefill"] == {"ready": 0, "known": 1}
    assert (await machine.get("/v1/models"))[1]["data"] == []
    assert not engine.ready
    await soon(machine.proxy.until_state(engine.http_address, State.READY))
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
    await machine.check_right()


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
    await machine.check_right()


@quick_probes
async def test_a_model_that_is_loaded_while_the_instance_runs_is_noticed(machine, pair) -> None:
    cards = json.dumps({"object": "list", "data": [{"id": "lora-1"}, {"id": "sim-model"}]})
    for engine in pair:
        engine.faults.fail_next(200, cards, path="/v1/models", times=1000)
    registry = machine.proxy.services.registry
    await soon(machine.proxy.until(lambda: all("lora-1" in i.models for i in registry.instances())))
    assert {card["id"] for card in (await machine.get("/v1/models"))[1]["data"]} == {"lora-1", "sim-model"}
    await machine.check_right()


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
            await machine.check_right(model=model)
    for model, engines in pairs.items():
        for engine in engines:
            assert [request.json["model"] for request in engine.received(PATH)] == [model] * 3
