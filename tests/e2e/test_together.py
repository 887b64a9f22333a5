"""Engines of this project's own connector: both legs at once, and decode's answer is right when prefill fails."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from disagg_proxy.health.liveness import LivenessConnections
from disagg_sim import SimEngine, encode, expected_text
from tests.conftest import soon
from tests.e2e.together import (
    ASK,
    COMPLETIONS,
    OWN,
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
    meets,
    right,
    settings,
    transfers,
)
from tests.simulated import Machine, text_of, text_of_events


@pytest.fixture
async def pair(machine: Machine) -> tuple[SimEngine, SimEngine]:
    return await machine.pair(**OWN)


@pytest.fixture
def unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deaths that no lifeline tells of."""
    monkeypatch.setattr(LivenessConnections, "_on_change", lambda self, instance: None)


# -- answers


@ROUTES
@pytest.mark.parametrize("stream", [False, True])
async def test_every_route(machine: Machine, pair, path: str, stream: bool) -> None:
    prefill, decode = pair
    if stream:
        assert text_of_events(await machine.stream(path, REQUESTS[path])) == RIGHT[path]
    else:
        assert text_of((await machine.post(path, REQUESTS[path]))[2]) == RIGHT[path]
    assert external(decode) >= TOKENS - 1 and computed(decode) == 1
    (from_prefill,), (from_decode,) = transfers(prefill, path), transfers(decode, path)
    assert from_decode == {**from_prefill, "from": prefill.kv_address}
    await clean(machine, prefill, decode)


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_lists_and_n(machine: Machine, pair, stream: bool) -> None:
    prompts = [PROMPT, f"{PROMPT} and more", PROMPT]
    body = {**ASK, "prompt": prompts, "n": 2, "temperature": 1.0}
    wanted = [expected_text(prompt, 8, index=index) for prompt in prompts for index in range(2)]
    if stream:
        found = await machine.stream(COMPLETIONS, body)
        assert [text_of_events(found, index) for index in range(6)] == wanted
    else:
        _, _, answer = await machine.post(COMPLETIONS, body)
        assert [choice["text"] for choice in answer["choices"]] == wanted
    assert external(pair[1]) == TOKENS - 1 + len(encode(prompts[1])) - 1
    await clean(machine, *pair)


async def test_wrong_kv_would_show(machine: Machine, pair) -> None:
    pair[0].faults.corrupt_kv = True
    status, _, body = await machine.post(COMPLETIONS, ASK)
    assert status == 200 and text_of(body) != RIGHT[COMPLETIONS]


async def test_decode_is_asked_before_prefill_has_answered(machine: Machine, pair) -> None:
    prefill, decode = pair
    with prefill.faults.held("answer"):
        answer = await asked(machine)
        await meets_held(prefill, decode)
        assert not answer.done()
    await right(answer)
    await clean(machine, prefill, decode)


async def meets_held(prefill: SimEngine, decode: SimEngine) -> None:
    await soon(prefill.wait_until(lambda s: s["held_at"] == "answer"))
    await soon(decode.wait_until(lambda s: s["http_requests"] > 0 and decode.received(COMPLETIONS)))


@ROUTES
async def test_the_clients_request_id_is_everybodys(machine: Machine, pair, path: str) -> None:
    for sent in ("my id/1", None):
        _, headers, body = await machine.post(path, REQUESTS[path], **({"X-Request-Id": sent} if sent else {}))
        seen = {engine.received(path)[-1].headers["X-Request-Id"] for engine in pair}
        assert seen == {headers["X-Request-Id"]} and (sent is None or seen == {sent})
        assert headers["X-Request-Id"] in body["id"] or path == RESPONSES


@pytest.mark.parametrize("stream", [False, True])
async def test_cached_tokens_are_those_of_prefill(machine: Machine, stream: bool) -> None:
    await machine.pair(**OWN, enable_prompt_tokens_details=True)
    for cached in (0, (TOKENS - 1) // 16 * 16):
        if stream:
            found = await machine.stream(COMPLETIONS, {**ASK, "stream_options": {"include_usage": True}})
            usage = found[-1]["usage"]
        else:
            usage = (await machine.post(COMPLETIONS, ASK))[2]["usage"]
        assert usage["prompt_tokens"] == TOKENS
        assert (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0) == cached


async def test_clients_cannot_steer_the_transfer(machine: Machine, pair) -> None:
    body = {**ASK, "kv_transfer_params": {"transfer_id": "mine", "from": "10.0.0.1:1"}, "request_id": "mine"}
    await right(machine.post(COMPLETIONS, body))
    for engine in pair:
        assert "mine" not in str(engine.received(COMPLETIONS)[0].json)


# -- prefill refuses


THINKING = [{"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}, {"type": "disabled"}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", THINKING, ids=lambda thinking: thinking["type"])
async def test_thinking_does_not_keep_prefill_from_its_part(machine: Machine, pair, thinking, stream: bool) -> None:
    """vLLM 0.32 refuses a budget that max_tokens does not exceed, and prefill's is 1."""
    path = "/v1/messages"
    body = {**REQUESTS[path], "max_tokens": 2000, "thinking": thinking, "stream": stream}
    plain = (await machine.post(path + "/count_tokens", body))[2]["input_tokens"]
    status, _, raw = await machine.send(path, body)
    assert status == 200, raw
    assert (computed(pair[1]), external(pair[1])) == (1, plain - 1)
    await clean(machine, *pair)


FORCED = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required", "max_tokens": 60}
CHATS = "/v1/chat/completions"


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_prefill_that_refuses_what_decode_accepts_is_counted_and_logged_once(
    machine: Machine, pair, caplog, path: str, stream: bool
) -> None:
    prefill, decode = pair
    said = b"{\"error\": {\"message\": \"[{'msg': 'no budget', 'input': 'a secret prompt'}]\"}}"
    body = {**REQUESTS[path], "stream": stream}
    if stream and path == COMPLETIONS:
        body["stream_options"] = {"include_usage": True}
    for _ in range(3):
        prefill.faults.fail_next(400, said, path=path)
        assert (await machine.send(path, body))[0] == 200
    assert external(decode) == 0
    await soon(machine.proxy.until_idle())
    shown = next(i for i in (await machine.get("/stats"))[1]["instances"] if i["role"] == "prefill")
    assert (shown["prefills_refused"], shown["failures_total"]) == (3, 0)
    logged = [record.getMessage() for record in caplog.records if "refuses requests" in record.getMessage()]
    assert len(logged) == 1 and "400" in logged[0] and "no budget" in logged[0] and "secret" not in logged[0]
    assert machine.proxy.services.stats.prompt_tokens == sum(decode.state()["tokens_by_source"].values()) > 0
    await clean(machine, *pair)


async def test_a_refusal_in_the_stream_of_a_prefill_frees_decode(machine: Machine, pair) -> None:
    """A forced tool call has prefill stream: its 200 comes before the engine's front end has checked the request."""
    prefill, _decode = pair
    body = {**REQUESTS[CHATS], **FORCED}
    event = b'data: {"error": {"message": "no", "type": "BadRequestError", "code": 400}}\n\ndata: [DONE]\n\n'
    prefill.faults.fail_next(200, event, {"Content-Type": "text/event-stream"}, path=CHATS)
    assert (await soon(machine.post(CHATS, body)))[0] == 200
    assert machine.proxy.instance(prefill.http_address).prefills_refused == 1
    await clean(machine, *pair)


async def test_what_both_refuse_is_no_such_refusal(machine: Machine, pair) -> None:
    refused = b'{"error": {"message": "no"}}'
    for engine in pair:
        engine.faults.fail_next(400, refused, path=COMPLETIONS)
    assert (await machine.post(COMPLETIONS, ASK))[0] == 400
    assert machine.proxy.instance(pair[0].http_address).prefills_refused == 0


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
    assert external(decode) == 0
    await clean(machine, prefill, decode)


async def test_a_prefill_that_is_dead_before(unnoticed, machine: Machine, pair) -> None:
    prefill, decode = pair
    await prefill.kill()
    await right(machine.post(COMPLETIONS, ASK))
    await clean(machine, decode)


async def test_a_prefill_that_is_killed_during(machine: Machine, pair) -> None:
    prefill, decode = pair
    prefill.faults.hold("forward")
    answer = await asked(machine)
    await meets(prefill, decode)
    await prefill.kill()
    await right(answer)
    await clean(machine, decode)


async def test_a_prefill_that_is_killed_in_mid_push(machine: Machine) -> None:
    prefill, decode = await machine.pair(**OWN, max_num_batched_tokens=16)
    prefill.faults.hold("forward", after=1)
    answer = await asked(machine)
    await soon(prefill.wait_until(lambda s: s["kv_sent"] == 1))
    await prefill.kill()
    await right(answer)
    assert external(decode) == 0
    await clean(machine, decode)


async def test_a_prefill_that_is_killed_after(machine: Machine, pair) -> None:
    prefill, decode = pair
    decode.faults.hold("answer")
    answer = await asked(machine)
    await soon(decode.wait_until(lambda s: s["held_at"] == "answer" and s["running"]))
    await prefill.kill()
    decode.faults.release()
    await right(answer)
    await clean(machine, decode)


@settings(prefill_timeout=0.2)
async def test_a_prefill_that_says_nothing(machine: Machine, pair) -> None:
    prefill, decode = pair
    prefill.faults.hang_next(path=COMPLETIONS)
    await right(machine.post(COMPLETIONS, ASK))
    await clean(machine, decode)


@settings(freeze_after_min=0.1, freeze_after_max=0.4)
async def test_a_frozen_prefill_releases_decode_and_decode_is_not_blamed(machine: Machine, pair) -> None:
    prefill, decode = pair
    prefill.faults.hold("forward")
    await right(asked_now(machine))
    assert machine.proxy.instance(prefill.http_address).freezes == 1
    assert machine.proxy.instance(decode.http_address).freezes == 0
    prefill.faults.release()
    await machine.proxy.until_pairs()
    await clean(machine, prefill, decode)


async def asked_now(machine: Machine) -> Any:
    return await machine.post(COMPLETIONS, ASK)


# -- many at once


async def test_two_hundred_requests_with_a_prefill_that_dies_among_them(machine: Machine) -> None:
    prefills = [(await machine.pair(**OWN))[0] for _ in range(2)]
    decodes = [engine for engine in machine.engines if engine not in prefills]

    async def one(number: int) -> None:
        prompt = f"{number} {PROMPT}"
        _, _, body = await machine.post(COMPLETIONS, {**ASK, "prompt": prompt})
        assert text_of(body) == expected_text(prompt, 8)
        if number == 50:
            await prefills[0].kill()

    await soon(asyncio.gather(*(one(number) for number in range(200))))
    await clean(machine, prefills[1], *decodes)


@pytest.mark.parametrize("seed", range(3))
async def test_a_hundred_clients_that_leave_at_random_moments(machine: Machine, dial, seed: int) -> None:
    rng = random.Random(seed)
    prefill, decode = await machine.pair(**OWN, prefill_tokens_per_second=20_000, time_per_output_token=0.001)

    async def visit() -> None:
        path = rng.choice(list(REQUESTS))
        body = {**REQUESTS[path], "max_tokens": rng.choice([1, 20, 200]), "stream": rng.random() < 0.7}
        ticks = rng.randrange(400)
        client = await dial(machine.proxy.url)
        client.post(path, body)
        for _ in range(ticks):
            await asyncio.sleep(0)
        client.leave()

    await soon(asyncio.gather(*(visit() for _ in range(100))))
    await clean(machine, prefill, decode)
    await right(machine.post(COMPLETIONS, ASK))
