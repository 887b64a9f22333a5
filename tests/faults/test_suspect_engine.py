"""An engine that may be stalled is suspected within seconds: new requests go to others, and nothing else happens. The
proxy is not serving when requests wait and nothing is answered."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disagg_proxy.cluster import steps
from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.page.verdict import verdict
from disagg_sim import SimEngine, expected_text
from tests.conftest import soon
from tests.faults.conftest import in_turn
from tests.simulated import REQUESTS, Machine, text_of

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
NEW = {**ASK, "prompt": "a prompt that no engine has seen"}

pytestmark = pytest.mark.interpreted

quick = pytest.mark.settings(
    freeze_after_min=60.0, freeze_after_max=300.0, prefill_policy="round_robin", decode_policy="round_robin"
)
"""No engine is found stalled, and the proxy is always serving: only suspicion comes within the time of a test."""


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of the detector takes 50 ms."""
    monkeypatch.setattr(steps, "INTERVAL", 0.05)
    monkeypatch.setattr(steps, "MIN_SUSPECT_SECONDS", 0.3)
    monkeypatch.setattr(steps, "_MAX_GAP", 0.2)


async def steps_known(machine: Machine, *engines: SimEngine) -> None:
    """Requests go on until the detector knows the steps of these engines."""
    instances = [machine.proxy.instance(engine.http_address) for engine in engines]
    while any(i.progress.steps.limit(0.0) is None for i in instances):
        await machine.check_right(max_tokens=8)


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.02)


async def held_request(machine: Machine, engine: SimEngine) -> tuple[asyncio.Task[Any], Instance]:
    """A request that the held ``engine`` does not answer. Its prompt is in no decode's prefix cache."""
    instance = machine.proxy.instance(engine.http_address)
    waiting = asyncio.create_task(machine.post(PATH, NEW))
    while not instance.progress.waiting():
        await asyncio.sleep(0.01)
        if waiting.done():
            waiting = asyncio.create_task(machine.post(PATH, NEW))
    return waiting, instance


@quick
@pytest.mark.parametrize("connector", ["p2p_nccl", "disagg_kv"])
@pytest.mark.parametrize("role", [0, 1], ids=["prefill", "decode"])
async def test_a_suspect_gets_no_new_requests_until_it_changes(machine: Machine, connector: str, role: int) -> None:
    pairs = [await machine.pair(connector=connector), await machine.pair(connector=connector)]
    engine = pairs[0][role]
    await soon(steps_known(machine, engine))
    with engine.faults.held("forward"):
        waiting, instance = await soon(held_request(machine, engine))
        await soon(until(lambda: instance.suspect))
        assert instance.state is State.READY
        got = len(engine.received(PATH))
        for _ in range(6):
            await machine.check_right()
        assert len(engine.received(PATH)) == got and not waiting.done()
        _, stats = await machine.get("/stats")
        assert {i["http_address"] for i in stats["instances"] if i["suspect"]} == {engine.http_address}
        assert (await machine.get("/health"))[0] == 200
    status, _, body = await soon(waiting)
    assert (status, text_of(body)) == (200, expected_text(NEW["prompt"], NEW["max_tokens"])), (
        "nothing was cut or sent again"
    )
    await soon(until(lambda: not instance.suspect))
    for _ in range(6):
        await machine.check_right()
    assert len(engine.received(PATH)) > got
    assert machine.proxy.services.stats.failovers == 0


@quick
async def test_the_only_one_is_used_although_it_is_suspect(machine: Machine, pair) -> None:
    decode = machine.proxy.instance(pair[1].http_address)
    machine.proxy.services.registry.suspect(decode, True)
    assert machine.proxy.services.selection.ready_pairs() == 1
    await machine.check_right()


@quick
async def test_an_engine_without_counters_is_not_suspected(machine: Machine, pair, monkeypatch) -> None:
    await soon(steps_known(machine, pair[1]))
    monkeypatch.setattr("disagg_proxy.health.stall_detector.engine_counters", lambda text: ())
    with pair[1].faults.held("forward"):
        waiting, instance = await soon(held_request(machine, pair[1]))
        await asyncio.sleep(1.0)
        assert not instance.suspect
    assert (await soon(waiting))[0] == 200


@in_turn
@pytest.mark.settings(freeze_after_min=0.1, freeze_after_max=300.0)
async def test_not_serving_is_said_by_health_stats_metrics_and_page(machine: Machine, pair) -> None:
    detector: Any = machine.proxy.services._stall_detector
    await machine.check_right()
    assert (await machine.get("/health"))[0] == 200
    detector.serving._longest = 0.3
    with pair[0].faults.held("forward"):
        waiting = [asyncio.create_task(machine.post(PATH, ASK)) for _ in range(3)]
        await soon(until(lambda: machine.proxy.services.not_serving()))
        status, health = await machine.get("/health")
        assert (status, health["status"], health["pairs"]) == (503, "not_serving", 1)
        assert "3 requests are in flight or queued, and no decode has made progress" in health["missing"][0]
        assert (await machine.get("/stats"))[1]["health"]["status"] == "not_serving"
        async with machine.http.get(f"{machine.proxy.url}/metrics") as answer:
            assert "disagg_proxy_not_serving 1.0" in await answer.text()
        shown = {**await machine.proxy.services.page_view(), "health": health}
        assert (verdict(shown)["level"], verdict(shown)["head"]["key"]) == ("bad", "head_not_serving")
    assert [(await soon(request))[0] for request in waiting] == [200] * 3
    assert (await machine.get("/health"))[0] == 200


@pytest.mark.settings(freeze_after_min=0.1, freeze_after_max=300.0)
async def test_a_long_unstreamed_answer_is_served(machine: Machine) -> None:
    await machine.pair(connector="disagg_kv", time_per_output_token=0.02)
    detector: Any = machine.proxy.services._stall_detector
    detector.serving._longest = 0.4
    answer = asyncio.create_task(machine.post(PATH, {**ASK, "max_tokens": 100, "ignore_eos": True}))
    seen = set()
    while not answer.done():
        seen.add(machine.proxy.services.not_serving())
        await asyncio.sleep(0.05)
    assert (await answer)[0] == 200 and seen == {""}, "its tokens are counted by the engine"
