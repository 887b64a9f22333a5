"""/v1/responses: a pair serves it where the engines' vLLM takes the transfer's fields, else a decode alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from openai import APIConnectionError, AsyncOpenAI

from disagg_proxy.cluster.instance import State
from disagg_proxy.coordinator.coordinator import Coordinator
from disagg_sim import SimEngine
from tests.conftest import Wire, soon
from tests.e2e.together import (
    ASK,
    COMPLETIONS,
    OWN,
    PROMPT,
    REQUESTS,
    RESPONSES,
    clean,
    external,
    in_turn,
    right,
    settings,
)
from tests.e2e.together import RIGHT as EVERY_RIGHT
from tests.simulated import Machine, text_of, text_of_events

RESPOND: dict[str, Any] = REQUESTS[RESPONSES]
RIGHT = EVERY_RIGHT[RESPONSES]
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture
async def pair(machine: Machine) -> tuple[SimEngine, SimEngine]:
    return await machine.pair(**OWN)


def alone(prefill: SimEngine, decode: SimEngine) -> bool:
    """Whether decode served what came, without prefill and without a transfer."""
    served = decode.received(RESPONSES)
    return bool(served) and not prefill.received(RESPONSES) and "kv_transfer_params" not in served[-1].json


# -- which engines serve it


async def test_prefill_computes_one_token_and_keeps_nothing(machine: Machine, pair) -> None:
    body = {**RESPOND, "store": True, "background": False, "stream": True, "tools": [FUNCTION]}
    assert len(await machine.stream(RESPONSES, body)) > 8
    (leg,) = pair[0].received(RESPONSES)
    del leg.json["kv_transfer_params"]
    assert leg.json == {**RESPOND, "max_output_tokens": 1, "stream": False, "store": False, "tools": [FUNCTION]}
    (leg,) = pair[1].received(RESPONSES)
    del leg.json["kv_transfer_params"]
    assert leg.json == body and external(pair[1]) > 0
    await clean(machine, *pair)


@pytest.mark.parametrize("changes", [
    {"background": True}, {"previous_response_id": "resp_1"}, {"tools": [{"type": "code_interpreter"}]},
    {"tools": [FUNCTION, {"type": "web_search_preview"}]}, {"truncation": "auto"}, {"truncation": None},
    {"input": [{"type": "item_reference", "id": "msg_1"}]},
    {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1:1/x"}]}]},
    {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "x", "file_url": "x:y"}]}]},
])  # fmt: skip
async def test_what_needs_one_engine_goes_to_a_decode_alone(machine: Machine, pair, changes: dict[str, Any]) -> None:
    await machine.post(RESPONSES, {**RESPOND, **changes})
    assert alone(*pair)
    await clean(machine, *pair)


@pytest.mark.parametrize("versions", [("0.18.1", "0.18.1"), ("0.18.1", "0.33.0"), ("0.33.0", "0.18.1")])
@pytest.mark.parametrize("stream", [False, True])
async def test_older_engines_get_no_transfer(machine: Machine, versions: tuple[str, str], stream: bool) -> None:
    prefill = await machine.engine("prefill", **OWN, version=versions[0])
    decode = await machine.engine("decode", **OWN, version=versions[1])
    await machine.proxy.until_pairs()
    if stream:
        assert text_of_events(await machine.stream(RESPONSES, RESPOND)) == RIGHT
    else:
        assert text_of((await machine.post(RESPONSES, RESPOND))[2]) == RIGHT
    assert alone(prefill, decode)
    await right(machine.post(COMPLETIONS, ASK))
    assert external(decode) > 0, "other routes have theirs"
    await clean(machine, prefill, decode)


async def test_the_version_is_that_of_the_process(machine: Machine) -> None:
    pair = await machine.pair(**OWN, version="0.18.1")
    assert machine.proxy.instance(pair[1].http_address).version == "0.18.1"
    again = []
    for engine in pair:
        await machine.kill(engine)
        again.append(await machine.restart(engine, version="0.19.0"))
    await machine.proxy.until_pairs()
    await soon(machine.post(RESPONSES, RESPOND))
    assert external(again[1]) > 0


@settings(probe_interval=0.05)
async def test_an_engine_that_does_not_say_its_version_serves_all_the_same(machine: Machine) -> None:
    prefill, decode = pair = await machine.pair(**OWN)
    for engine in pair:
        engine.faults.fail_next(404, b"{}", path="/version", times=99)
        engine.faults.health_status = 503
        await machine.proxy.until_state(engine.http_address, State.PROBING)
        engine.faults.health_status = None
    await machine.proxy.until_pairs()
    assert [machine.proxy.instance(engine.http_address).version for engine in pair] == ["", ""]
    assert text_of((await machine.post(RESPONSES, RESPOND))[2]) == RIGHT
    assert alone(prefill, decode)


async def test_beside_engines_that_it_would_end_a_decode_serves_alone(machine: Machine, pair) -> None:
    others = await machine.pair()
    for _ in range(4):
        assert text_of((await machine.post(RESPONSES, RESPOND))[2]) == RIGHT
    assert alone(*pair) and not any(engine.received(RESPONSES) for engine in others)
    await machine.unharmed(*pair, *others)


async def test_not_even_a_race_sends_it_to_engines_that_it_would_end(machine: Machine, monkeypatch) -> None:
    monkeypatch.setattr(Coordinator, "_pairs_respond", lambda self: True)
    pair = await machine.pair()
    status, _, answer = await machine.post(RESPONSES, RESPOND)
    assert status == 501 and "/v1/chat/completions" in answer["error"]["message"]
    await machine.unharmed(*pair)
    await machine.check_right()


async def test_they_wait_for_such_a_decode(machine: Machine, pair) -> None:
    """A 501 would say that it can never be served."""
    await machine.kill(pair[1])
    for changes in ({}, {"background": True}):
        status, _, answer = await machine.post(RESPONSES, {**RESPOND, **changes})
        assert status == 503, answer


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_stored_responses_are_not_served(machine: Machine, pair, method: str) -> None:
    async with machine.http.request(method, f"{machine.proxy.url}{RESPONSES}/resp_1") as answer:
        assert answer.status == 501 and "whole conversation" in (await answer.json())["error"]["message"]


# -- usage


@pytest.mark.parametrize("version", ["0.19.0", "0.33.0"])
async def test_cached_tokens_are_those_of_prefill(machine: Machine, version: str) -> None:
    """Decode counts what it loaded as cached, and says so whatever its flags are."""
    pair = await machine.pair(**OWN, version=version)
    length = (await machine.post(RESPONSES, RESPOND))[2]["usage"]["input_tokens"]
    cached = (length - 1) // 16 * 16
    shown = {"cached_tokens": cached, "input_tokens_per_turn": [], "cached_tokens_per_turn": []}
    if version > "0.31":
        shown["cache_write_tokens"] = length // 16 * 16 - cached
    usage = (await machine.post(RESPONSES, RESPOND))[2]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (length, 8)
    assert usage["input_tokens_details"] == shown
    for sizes in ((), (1,), (50,), (7, 300)):
        pair[1].faults.split_writes(sizes)
        last = (await machine.stream(RESPONSES, RESPOND))[-1]
        assert last["type"] == ("response.completed" if version < "0.33" else "response.incomplete")
        assert last["response"]["usage"] == usage, sizes
    await clean(machine, *pair)
    records = machine.proxy.services.event_log.records
    assert {(r.prompt_tokens, r.output_tokens, r.outcome) for r in records} == {(length, 8, "ok")}
    assert [r.cached_tokens for r in records] == [0, *[cached] * 5]


# -- failures: as on chat, although a stream begins before the engine does


async def stream_begun(decode: SimEngine) -> None:
    await soon(decode.wait_until(lambda s: s["held_at"] == "schedule" and bool(decode.received(RESPONSES))))


@in_turn
@pytest.mark.parametrize("how", ["500", "reset", "killed", "cut"])
@pytest.mark.parametrize("stream", [False, True])
async def test_another_decode(machine: Machine, two, how: str, stream: bool) -> None:
    prefill, decodes = two
    victim = decodes[0]
    if how == "500":
        victim.faults.fail_next(500, b"no", path=RESPONSES)
    elif how == "reset":
        victim.faults.reset_next(path=RESPONSES, times=2)
    elif how == "cut":
        # Twice, for a kept connection that closes is replaced once.
        victim.faults.cut_stream_after(0, times=2) if stream else victim.faults.close_next(path=RESPONSES, times=2)
    else:
        victim.faults.hold("schedule")
    sent = [asyncio.create_task(machine.send(RESPONSES, {**RESPOND, "stream": stream})) for _ in range(2)]
    if how == "killed":
        await stream_begun(victim)
        await victim.kill()
    for status, _, raw in await soon(asyncio.gather(*sent)):
        assert status == 200
        if stream:
            found = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: ")]
            assert [event["type"] for event in found].count("response.created") == 1
            assert text_of_events(found) == RIGHT
        else:
            assert text_of(json.loads(raw)) == RIGHT
    assert machine.proxy.services.stats.failovers == 1
    await clean(machine, prefill, *(d for d in decodes if how != "killed" or d is not victim))


@settings(freeze_after_min=0.1, freeze_after_max=0.4)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_frozen_decode_is_replaced(machine: Machine, two, stream: bool) -> None:
    prefill, decodes = two
    for decode in decodes:
        decode.faults.hold("forward")
    sent = asyncio.create_task(machine.send(RESPONSES, {**RESPOND, "stream": stream}))
    waits = {asyncio.create_task(d.wait_until(lambda s: s["held_at"] == "forward")): d for d in decodes}
    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    for task in pending:
        task.cancel()
    first = waits[done.pop()]
    next(d for d in decodes if d is not first).faults.release()
    status, _, _ = await soon(sent)
    assert status == 200 and machine.proxy.services.stats.failovers == 1
    first.faults.release()
    await machine.proxy.until_pairs(2)
    await clean(machine, prefill, *decodes)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_busy_prefill_is_no_reason_for_decode_to_compute(machine: Machine, pair, stream: bool) -> None:
    prefill, decode = pair
    prefill.faults.fail_next(503, b"{}", path=RESPONSES)
    with decode.faults.held("schedule"):
        status, _, raw = await soon(machine.send(RESPONSES, {**RESPOND, "stream": stream}))
    assert status == 503, raw
    await clean(machine, *pair)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["400", "500", "reset"])
async def test_a_prefill_that_fails_costs_the_client_nothing(machine: Machine, pair, how: str, stream: bool) -> None:
    prefill, decode = pair
    if how.isdigit():
        prefill.faults.fail_next(int(how), b'{"error": {"message": "no"}}', path=RESPONSES)
    else:
        prefill.faults.reset_next(path=RESPONSES, times=2)
    if stream:
        assert text_of_events(await soon(machine.stream(RESPONSES, RESPOND))) == RIGHT
    else:
        assert text_of((await soon(machine.post(RESPONSES, RESPOND)))[2]) == RIGHT
    assert external(decode) == 0
    await clean(machine, prefill, decode)


async def test_what_both_refuse_is_prefills_refusal_and_nobodys_fault(machine: Machine, two) -> None:
    """vLLM breaks off a stream that its engine refuses: each decode would be blamed for a client's mistake."""
    prefill, decodes = two
    prefill.faults.fail_next(400, b'{"error": {"message": "not such a grammar"}}', path=RESPONSES)
    for decode in decodes:
        decode.faults.cut_stream_after(0, times=2)
    status, _, raw = await soon(machine.send(RESPONSES, {**RESPOND, "stream": True}))
    assert status == 400 and b"not such a grammar" in raw
    assert machine.proxy.services.stats.failovers == 0
    assert all(machine.proxy.instance(d.http_address).failures_total == 0 for d in decodes)
    await clean(machine, prefill, *decodes)


async def test_decode_broken_in_mid_stream_is_a_cut(machine: Machine, pair, dial: Callable[[str], Any]) -> None:
    pair[1].faults.cut_stream_after(3)
    client: Wire = await dial(machine.proxy.url)
    client.post(RESPONSES, {**RESPOND, "stream": True})
    assert (await client.head())[0] == 200
    with pytest.raises(asyncio.IncompleteReadError):
        while await client.chunk():
            pass
    assert machine.proxy.services.stats.failovers == 0
    await clean(machine, *pair)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("moment", ["prefill", "preamble", "stream"])
async def test_a_client_that_leaves(machine: Machine, pair, dial, moment: str, stream: bool) -> None:
    prefill, decode = pair
    held, point = (prefill, "forward") if moment == "prefill" else (decode, "answer")
    held.faults.hold(point, after=3 if moment == "stream" else 0)
    client: Wire = await dial(machine.proxy.url)
    client.post(RESPONSES, {**RESPOND, "max_output_tokens": 50, "stream": stream})
    await soon(held.wait_until(lambda s: s["held_at"] == point and s["running"]))
    client.leave()
    await soon(machine.proxy.until_idle())
    held.faults.release()
    await clean(machine, *pair)


# -- the real client


@pytest.fixture
async def client(machine: Machine) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=machine.proxy.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


async def test_openai(client: AsyncOpenAI, pair) -> None:
    answer = await client.responses.create(model="sim-model", input=PROMPT, max_output_tokens=8)
    assert answer.output_text == RIGHT and answer.status == "incomplete" and answer.usage is not None
    assert answer.usage.output_tokens == 8 and external(pair[1]) > 0
    items: Any = [{"role": "user", "content": [{"type": "input_text", "text": PROMPT}]}]
    answer = await client.responses.create(model="sim-model", input=items, max_output_tokens=8)
    assert answer.output_text == RIGHT
    async with client.responses.stream(model="sim-model", input=PROMPT, max_output_tokens=8) as stream:
        kinds = [event.type async for event in stream]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds.count("response.output_text.delta") == 8
    assert len(pair[0].received(RESPONSES)) == 3


async def test_openai_sees_a_cut(client: AsyncOpenAI, pair) -> None:
    pair[1].faults.cut_stream_after(3)
    text = ""
    with pytest.raises(APIConnectionError):
        async for event in await client.responses.create(model="sim-model", input=PROMPT, stream=True):
            text += event.delta if event.type == "response.output_text.delta" else ""
    assert text and RIGHT.startswith(text)
