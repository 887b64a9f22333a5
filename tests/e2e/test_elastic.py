"""Whichever way a request is placed, it gets the same bytes; and what shows the way."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from disagg_proxy.cluster.choice import Way
from disagg_proxy.cluster.engine_load import EngineLoad
from disagg_proxy.cluster.instance import State
from disagg_sim import SimEngine
from tests.conftest import soon
from tests.e2e.together import COMPLETIONS, OWN, REQUESTS, RIGHT, ROUTES, clean, external
from tests.placed import dictate
from tests.simulated import Machine, text_of

settings = pytest.mark.settings
NO_CACHE = {**OWN, "prefix_cache_blocks": 0}
ways = pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)


@pytest.fixture
async def pair(machine: Machine) -> tuple[SimEngine, SimEngine]:
    return await machine.pair(**NO_CACHE)


def comparable(raw: bytes) -> bytes:
    """Without times, and without the ids that engines make up (/v1/responses)."""
    return re.sub(rb'"(created|created_at|completed_at)": ?[\d.]+|(resp|msg|rs)_[0-9a-f]+', b"", raw)


@ROUTES
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_the_answer_is_the_same_whichever_way(machine: Machine, pair, path: str, stream: bool) -> None:
    answers = []
    for way in Way:
        dictate(machine.proxy, way)
        status, _, raw = await machine.send(path, {**REQUESTS[path], "stream": stream}, **{"X-Request-Id": "same"})
        assert status == 200
        if not stream:
            assert text_of(json.loads(raw)) == RIGHT[path]
        answers.append(comparable(raw))
    assert answers[0] == answers[1] == answers[2]
    assert [len(engine.received(path)) for engine in pair] == [2, 2]
    await clean(machine, *pair)


@settings(served_by_header=True)
@ways
async def test_what_shows_the_way(machine: Machine, pair, way: Way) -> None:
    prefill, decode = pair
    dictate(machine.proxy, way)
    _, headers, _ = await machine.send(COMPLETIONS, REQUESTS[COMPLETIONS])
    names = {
        Way.SPLIT: f"prefill={prefill.http_address}, decode={decode.http_address}",
        Way.DECODE_ALONE: f"decode={decode.http_address}",
        Way.PREFILL_ALONE: f"prefill={prefill.http_address}",
    }
    assert headers["X-Served-By"] == names[way]
    _, stats = await machine.get("/stats")
    assert stats["placement"]["requests"] == {other.value: int(other is way) for other in Way}
    assert bool(external(decode)) is (way is Way.SPLIT)
    await clean(machine, *pair)


@settings(placement="elastic", slo_ttft_ms=400.0, slo_tpot_ms=50.0, prefill_policy="prefix_aware")
async def test_it_learns_and_then_decides(machine: Machine, pair) -> None:
    """Until eight answers are known everything is split; the figures of /stats are those of the engines."""
    placement = machine.proxy.services.placement_report
    body = {**REQUESTS[COMPLETIONS], "max_tokens": 12, "stream_options": {"include_usage": True}}
    for number in range(9):
        assert placement()["state"] == "learning"
        await machine.stream(COMPLETIONS, {**body, "prompt": f"{number} {body['prompt']}"})
        await soon(machine.proxy.until_idle())
        if placement()["state"] != "learning":
            break
    assert number == 7 and placement()["state"] == "elastic"
    _, stats = await machine.get("/stats")
    assert stats["placement"]["mode"] == "elastic" and stats["placement"]["requests"]["split"] == 8
    shown = stats["placement"]["engines"]
    assert set(shown) == {engine.http_address for engine in pair}
    assert shown[pair[0].http_address]["prefill_samples"] == shown[pair[1].http_address]["step_samples"] == 8
    for _ in range(4):
        await machine.check_right()
    await clean(machine, *pair)


@settings(placement="elastic")
async def test_a_prefill_serves_while_there_is_no_decode(machine: Machine) -> None:
    prefill = await machine.engine("prefill", **OWN)
    await machine.proxy.until_state(prefill.http_address, State.READY)
    await machine.check_right()
    status, health = await machine.get("/health")
    assert (status, health["decodes_that_serve_alone"]) == (200, 1)


@settings(placement="elastic", decode_alone=False)
async def test_unless_requests_are_to_be_split(machine: Machine) -> None:
    prefill = await machine.engine("prefill", **OWN)
    await machine.proxy.until_state(prefill.http_address, State.READY)
    assert (await machine.send(COMPLETIONS, REQUESTS[COMPLETIONS]))[0] == 503


@settings(placement="elastic")
async def test_other_connectors_are_not_concerned(machine: Machine) -> None:
    pair = await machine.pair()
    for way in Way:
        dictate(machine.proxy, way)
        await machine.check_right()
    assert [len(engine.received(COMPLETIONS)) for engine in pair] == [3, 3]


@settings(queue_timeout=30.0)
async def test_requests_whose_kv_does_not_fit_wait_and_are_computed_once(machine: Machine, pair) -> None:
    """Decode's KV cache holds one of them: the others wait at the proxy, and no prefill computes for nothing."""
    prefill, decode = pair
    instance = machine.proxy.instance(decode.http_address)
    instance.engine_load = EngineLoad(0.0, kv_capacity_tokens=50)
    decode.faults.hold("schedule")
    body = {**REQUESTS[COMPLETIONS], "max_tokens": 8}
    requests = [asyncio.ensure_future(machine.post(COMPLETIONS, body)) for _ in range(3)]
    await machine.proxy.until(lambda: machine.proxy.services.admission_queue.waiting == 2)
    assert (instance.answering, len(prefill.received(COMPLETIONS))) == (1, 1)
    assert instance.kv_committed > 8
    decode.faults.release()
    assert [(await soon(request))[0] for request in requests] == [200] * 3
    assert len(prefill.received(COMPLETIONS)) == 3
    await clean(machine, *pair)
    assert instance.kv_committed == 0


@settings(queue_timeout=0.2)
async def test_what_waits_for_kv_too_long_is_refused(machine: Machine, pair) -> None:
    _, decode = pair
    machine.proxy.instance(decode.http_address).engine_load = EngineLoad(0.0, kv_capacity_tokens=50)
    decode.faults.hold("schedule")
    first = asyncio.ensure_future(machine.post(COMPLETIONS, REQUESTS[COMPLETIONS]))
    await machine.proxy.until(lambda: machine.proxy.instance(decode.http_address).answering == 1)
    status, _, body = await machine.post(COMPLETIONS, REQUESTS[COMPLETIONS])
    assert status == 429 and "QUEUE_TIMEOUT" in body["error"]["message"]
    decode.faults.release()
    assert (await soon(first))[0] == 200
