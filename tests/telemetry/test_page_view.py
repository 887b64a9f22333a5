"""What a page is told: requests of every end, whichever way they came in, and nothing that is secret."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

import pytest

from disagg_proxy.cluster.instance import State
from tests.conftest import running_proxy, soon
from tests.simulated import REQUESTS, Machine

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
SOON = pytest.mark.settings(freeze_after_min=0.4, freeze_after_max=0.4, probe_interval=0.1)


async def view(machine) -> dict:
    """As JSON has it."""
    return json.loads(json.dumps(await machine.proxy.services.page_view()))


async def recent(machine) -> list[dict]:
    await soon(machine.proxy.until_idle())
    return (await view(machine))["recent"]


async def queued(machine, count: int) -> None:
    while machine.proxy.services.admission_queue.waiting != count:
        await asyncio.sleep(0)


async def test_before_anything_has_happened(machine) -> None:
    whole = await view(machine)
    assert whole["instances"] == whole["flows"] == whole["recent"] == whole["events"] == []
    assert whole["latency"]["ttft"] == {"count": 0, "p50": None, "p90": None, "p99": None}
    *before, now = whole["rates"]["steps"]
    assert len(before) == 119 and now["requests"] == {} and now["in_flight"] == 0
    assert [step["requests"] for step in before[:100]] == [None] * 100, "nothing is known from before the start"
    assert {before[0][name] for name in ("in_flight", "queued", "pieces", "kv_waiting_bytes")} == {None}
    assert before[0]["ttft"] == before[0]["gap"] == {"p50": None, "p90": None, "p99": None}


@pytest.mark.parametrize("chunked", [False, True], ids=["direct", "through Quart"])
@pytest.mark.parametrize("path", list(REQUESTS))
async def test_a_streamed_request(machine, pair, dial, path: str, chunked: bool) -> None:
    client = await dial(machine.proxy.url)
    client.chunked = chunked
    options = {} if path == "/v1/messages" else {"stream_options": {"include_usage": True}}
    body = {**REQUESTS[path], "max_tokens": 40, "stream": True, **options}
    client.post(path, body, "X-Request-Id: mine")
    assert (await client.answer())[0] == 200
    (record,) = await recent(machine)
    keys = [machine.proxy.instance(engine.http_address).key for engine in pair]
    assert (record["route"], record["client_id"], record["model"]) == (path, "mine", "sim-model")
    assert [record["prefill"], record["decode"]] == keys and record["id"] and "___" not in record["id"]
    assert (record["status"], record["outcome"], record["cause"], record["tries"]) == (200, "ok", None, 1)
    assert record["streamed"] and record["output_tokens"] == 40 and record["prompt_tokens"] > 0
    assert 1 < record["pieces"] <= 50 and record["gap_ms"] > 0
    bars = record["bars"]
    assert list(bars) == ["prefill", "transfer", "decode"]
    assert 0 <= bars["prefill"][0] < bars["prefill"][1] <= bars["transfer"][0] < bars["transfer"][1]
    assert bars["transfer"][1] == bars["decode"][0] == record["ttft_ms"] < bars["decode"][1] == record["total_ms"]
    whole = await view(machine)
    assert whole["flows"] == [{"prefill": keys[0], "decode": keys[1], "in_flight": 0, "total": 1}]
    assert whole["totals"]["requests"] == {"ok": 1} and whole["totals"]["output_tokens"] == 40
    assert whole["latency"]["ttft"]["count"] == 1 and whole["latency"]["gap"]["count"] >= 1
    steps = [step for step in whole["rates"]["steps"] if step["requests"] is not None]
    assert sum(step["pieces"] for step in steps) == record["pieces"]
    assert sum(step["output_tokens"] for step in steps) == 40
    found = [step["ttft"]["p99"] for step in steps if step["ttft"]["p99"] is not None]
    assert found == [pytest.approx(record["ttft_ms"], rel=0.06)]


@pytest.mark.parametrize("path", list(REQUESTS))
async def test_a_whole_answer(machine, pair, path: str) -> None:
    assert (await machine.post(path, REQUESTS[path]))[0] == 200
    (record,) = await recent(machine)
    assert (record["streamed"], record["ttft_ms"], record["pieces"]) == (False, None, 0)
    assert record["output_tokens"] == 8 and record["prompt_tokens"] > 0
    assert list(record["bars"]) == ["prefill", "decode"] and record["bars"]["decode"][1] == record["total_ms"]


async def test_every_other_end_has_a_record(machine, pair, dial) -> None:
    _, decode = pair
    await machine.post(PATH, {"prompt": 1, "model": 2})
    await machine.post(PATH, {**ASK, "model": "nobody"})
    await machine.post(PATH, {"prompt": "", "model": "sim-model"})
    pair[0].faults.fail_next(500, path=PATH)
    await machine.post(PATH, ASK)
    with decode.faults.held("answer"):
        client = await dial(machine.proxy.url)
        client.post(PATH, {**ASK, "stream": True})
        await decode.wait_until(lambda state: state["held_at"] == "answer" and state["running"] + state["waiting"] == 1)
        await machine.left(client)
    ends = [(r["outcome"], r["cause"], r["status"], r["tries"]) for r in await recent(machine)]
    assert ends == [
        ("client_error", "invalid_request", 400, 0),
        ("client_error", "model_not_found", 404, 0),
        ("client_error", "engine_400", 400, 1),
        ("engine_error", "engine_failed", 502, 1),
        ("client_left", "before_first_byte", None, 1),
    ]
    whole = await view(machine)
    assert whole["totals"]["requests"] == {"client_error": 3, "engine_error": 1, "client_left": 1}
    assert whole["totals"]["in_flight"] == 0 and all(flow["in_flight"] == 0 for flow in whole["flows"])


async def test_without_a_pair(machine) -> None:
    assert (await machine.post(PATH, ASK))[0] == 503
    (record,) = await recent(machine)
    assert (record["outcome"], record["cause"], record["status"]) == ("no_pair", "no_pair", 503)


@pytest.mark.settings(decode_max_in_flight=1, max_queue=1)
@pytest.mark.parametrize("chunked", [False, True], ids=["direct", "through Quart"])
async def test_the_queue(machine, pair, dial, chunked: bool) -> None:
    _, decode = pair
    services = machine.proxy.services
    with decode.faults.held("answer"):
        first = asyncio.ensure_future(machine.stream(PATH, ASK))
        await decode.wait_until(lambda state: state["held_at"] == "answer")
        client = await dial(machine.proxy.url)
        client.chunked = chunked
        client.post(PATH, ASK)
        await soon(queued(machine, 1))
        assert (await machine.post(PATH, ASK))[0] == 429
        services._sample_timer.cancel()
        services._sample()
        client.leave()
        await soon(queued(machine, 0))
        second = asyncio.ensure_future(machine.post(PATH, ASK))
        await soon(queued(machine, 1))
    await soon(asyncio.gather(first, second))
    found = await recent(machine)
    ends = [(r["outcome"], r["cause"], r["tries"]) for r in found]
    assert sorted(ends[:2]) == [("client_left", "in_queue", 0), ("turned_away", "overloaded", 0)]
    assert ends[2:] == [("ok", None, 1)] * 2
    assert next(iter(found[-1]["bars"])) == "queue" and found[-1]["queue_ms"] > 0
    steps = [step for step in (await view(machine))["rates"]["steps"] if step["requests"] is not None]
    assert max(step["queued"] for step in steps) == max(step["in_flight"] for step in steps) == 1


async def test_a_request_that_failed_over(machine) -> None:
    first, second = await machine.pair(), await machine.pair()
    for prefill, _ in (first, second):
        prefill.faults.fail_next(503, path=PATH)
    first[0].faults.fail_next(503, path=PATH)
    status, _, _ = await machine.post(PATH, ASK)
    (record,) = await recent(machine)
    assert record["tries"] == 2 and record["status"] == status


@SOON
async def test_a_decode_that_froze_can_be_told_from_the_events(machine, pair) -> None:
    _prefill, decode = pair
    decode.faults.lose_kv()
    await soon(asyncio.gather(*(machine.stream(PATH, ASK) for _ in range(3))))
    await soon(machine.proxy.until_state(decode.http_address, State.READY))
    key = machine.proxy.instance(decode.http_address).key
    events = [e for e in (await view(machine))["events"] if e["instance"] == key]
    assert [e["kind"] for e in events] == ["admitted", "frozen", "replayed", "freed", "admitted"]
    assert "stalled" in events[1]["text"]
    assert [e["seq"] for e in events] == sorted(e["seq"] for e in events)


async def test_kv_of_an_abandoned_request_is_an_event(machine, pair) -> None:
    await machine.post(PATH, {"prompt": "x", "max_tokens": 1, "prompt_logprobs": 1})
    await machine.unharmed(*pair)
    assert [e["kind"] for e in (await view(machine))["events"]] == ["admitted", "admitted", "kv_drained"]


@pytest.mark.settings(api_key="sk-secret")
async def test_neither_prompts_nor_keys_nor_clients_are_in_it(machine, pair) -> None:
    key = {"Authorization": "Bearer sk-secret"}
    await machine.post(PATH, {**ASK, "prompt": "a secret prompt"}, **key)
    await machine.post(PATH, {**ASK, "prompt": 7, "secret_field": "a secret prompt"}, **key)
    await machine.proxy.until_idle()
    whole = await view(machine)
    assert len(whole["recent"]) == 2
    assert "secret" not in json.dumps(whole)


@pytest.mark.parametrize("begun", [False, True], ids=["before its first byte", "in mid-stream"])
@pytest.mark.parametrize("chunked", [False, True], ids=["direct", "through Quart"])
async def test_a_request_that_the_shutdown_cuts_off(http, dial, chunked: bool, begun: bool) -> None:
    async with running_proxy(shutdown_grace=0.3) as proxy, AsyncExitStack() as stack:
        machine = Machine(proxy, stack, http)
        _, decode = await machine.pair()
        decode.faults.hold("answer")
        client = await dial(proxy.url)
        client.chunked = chunked
        client.post(PATH, {**ASK, "stream": True, "max_tokens": 50})
        await soon(decode.wait_until(lambda state: state["held_at"] == "answer"))
        if begun:
            decode.faults.step("answer")
            await client.head()
        await soon(proxy.stop())
        decode.faults.release()
        (record,) = proxy.services.event_log.records
        assert (record.outcome, record.cause) == ("cut" if begun else "unavailable", "shutdown")
