"""Routes that only an engine can serve that computes without a pair: pooling."""

from __future__ import annotations

from typing import Any

import pytest

from disagg_sim import SimEngine
from disagg_sim.pooling_api import embedding
from tests.conftest import soon
from tests.e2e.together import OWN, RESPONSES, clean, settings
from tests.simulated import Machine

EMBEDDINGS = "/v1/embeddings"
EMBED: dict[str, Any] = {"model": "sim-model", "input": ["one", "two"]}


@pytest.fixture
async def pair(machine: Machine) -> tuple[SimEngine, SimEngine]:
    return await machine.pair(**OWN, pooling=True)


async def embed(machine: Machine, body: dict[str, Any] = EMBED) -> tuple[int, Any]:
    status, _, answer = await soon(machine.post(EMBEDDINGS, body))
    return status, answer


async def test_prefill_embeds(machine: Machine, pair) -> None:
    """The work is like a prefill's, so decode's tokens are not held up by it."""
    status, answer = await embed(machine)
    assert status == 200 and [one["embedding"] for one in answer["data"]] == [embedding("one"), embedding("two")]
    assert pair[0].received(EMBEDDINGS) and not pair[1].received(EMBEDDINGS)
    await clean(machine, *pair)


async def test_decode_embeds_while_there_is_no_prefill(machine: Machine, pair) -> None:
    await machine.kill(pair[0])
    status, _ = await embed(machine)
    assert status == 200 and pair[1].received(EMBEDDINGS)


async def test_engines_that_it_would_end_are_left_alone(machine: Machine, pair) -> None:
    others = await machine.pair(pooling=True)
    for _ in range(4):
        assert (await embed(machine))[0] == 200
    assert not any(engine.received(EMBEDDINGS) for engine in others)
    await machine.unharmed(*pair, *others)


async def test_such_engines_would_have_died(machine: Machine) -> None:
    """Without this the test above could pass with engines that take everything."""
    engine = await machine.engine("prefill", pooling=True)
    async with machine.http.post(f"http://{engine.http_address}{EMBEDDINGS}", json=EMBED) as answer:
        assert answer.status == 500
    assert engine.state()["dead"]


async def test_only_other_engines(machine: Machine) -> None:
    pair = await machine.pair(pooling=True)
    status, answer = await embed(machine)
    assert status == 501 and "docs/connector.md" in answer["error"]["message"]
    await machine.unharmed(*pair)


async def test_no_engine_and_an_unknown_model(machine: Machine) -> None:
    assert (await embed(machine))[0] == 503
    await machine.pair(**OWN, pooling=True)
    status, answer = await embed(machine, {**EMBED, "model": "other"})
    assert status == 404 and "sim-model" in answer["error"]["message"]


async def test_the_engine_says_what_its_model_cannot_do(machine: Machine) -> None:
    pair = await machine.pair(**OWN)
    status, _, _ = await machine.send(EMBEDDINGS, EMBED)
    assert status == 404
    status, _, _ = await machine.send("/pooling", EMBED)
    assert status == 404
    pair[0].faults.fail_next(501, b'{"error": {"message": "not this model"}}', path="/score")
    status, _, raw = await machine.send("/score", EMBED)
    assert status == 501 and b"not this model" in raw
    pair[0].faults.fail_next(500, b"{}", path="/score")
    assert (await machine.send("/score", EMBED))[0] == 502


@settings(api_key="secret", engine_api_key="inner")
async def test_keys(machine: Machine) -> None:
    await machine.pair(**OWN, pooling=True, api_key="inner")
    assert (await machine.send(EMBEDDINGS, EMBED))[0] == 401
    assert (await machine.send(EMBEDDINGS, EMBED, Authorization="Bearer secret"))[0] == 200


async def test_clients_cannot_steer_the_engine(machine: Machine, pair) -> None:
    steering = {"kv_transfer_params": {"transfer_id": "x", "from": "127.0.0.1:1"}, "request_id": "x"}
    assert (await embed(machine, {**EMBED, **steering}))[0] == 200
    await soon(machine.post(RESPONSES, {"model": "sim-model", "input": "x", "background": True, **steering}))
    for engine, path in zip(pair, (EMBEDDINGS, RESPONSES), strict=True):
        assert not steering.keys() & engine.received(path)[0].json.keys()
