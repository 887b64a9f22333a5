"""The table of requests in docs/engine-behaviour.md: what works, is refused, kills, or comes back as garbage."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest

from disagg_sim import encode, expected_chat_text, expected_ids, expected_text

from .pair import CHAT, COMPLETIONS, MESSAGES, Answer, Pair, cancelled, running

MESSAGE = [{"role": "user", "content": "How deep is the sea?"}]


async def test_completions(pair: Pair) -> None:
    prefill, decode = await pair.both(COMPLETIONS, {"prompt": "the sea", "max_tokens": 9})
    choice = decode.json["choices"][0]
    assert choice["text"] == expected_text("the sea", 9)
    assert choice["finish_reason"] == "length"
    assert decode.json["usage"] == {
        "prompt_tokens": len(encode("the sea")),
        "completion_tokens": 9,
        "total_tokens": len(encode("the sea")) + 9,
        "prompt_tokens_details": None,
    }
    assert prefill.json["choices"][0]["text"] == expected_text("the sea", 1)


async def test_chat(pair: Pair) -> None:
    _, decode = await pair.both(CHAT, {"messages": MESSAGE, "max_tokens": 9})
    assert decode.json["choices"][0]["message"]["content"] == expected_chat_text(MESSAGE, 9)


async def test_anthropic_messages(pair: Pair) -> None:
    _, decode = await pair.both(MESSAGES, {"model": "sim-model", "messages": MESSAGE, "max_tokens": 9})
    assert decode.json["content"] == [{"type": "text", "text": expected_chat_text(MESSAGE, 9)}]
    assert decode.json["stop_reason"] == "max_tokens"


async def test_a_list_of_prompts_has_one_id_each(pair: Pair) -> None:
    request_id = pair.new_id()
    prompts = ["one", "two of them", "three"]
    await pair.prefill(COMPLETIONS, {"prompt": prompts}, request_id)
    ids = {f"cmpl-{request_id}-{i}" for i in range(3)}
    await pair.d.wait_until(lambda s: s["kv_received"] == 12)
    assert set(pair.d.state()["kv_waiting"]) == ids
    answer = await pair.post(pair.d, COMPLETIONS, {"prompt": prompts, "max_tokens": 5}, request_id)
    assert [c["text"] for c in answer.json["choices"]] == [expected_text(prompt, 5) for prompt in prompts]
    assert pair.d.state()["kv_waiting"] == {}


@pytest.mark.parametrize("prompt", [[5, 9, 900, 70_000], [[5, 9, 900], [1, 2]]])
async def test_token_id_prompts(pair: Pair, prompt: list[Any]) -> None:
    _, answer = await pair.both(COMPLETIONS, {"prompt": prompt, "max_tokens": 5})
    single = prompt if isinstance(prompt[0], list) else [prompt]
    assert [c["text"] for c in answer.json["choices"]] == [expected_text(ids, 5) for ids in single]


async def test_logprobs(pair: Pair) -> None:
    _, answer = await pair.both(COMPLETIONS, {"prompt": "the sea", "max_tokens": 3, "logprobs": 2})
    logprobs = answer.json["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == expected_text("the sea", 3)
    assert all(-1 <= value <= 0 for value in logprobs["token_logprobs"])
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]

    _, answer = await pair.both(CHAT, {"messages": MESSAGE, "max_tokens": 3, "logprobs": True, "top_logprobs": 2})
    content = answer.json["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == expected_chat_text(MESSAGE, 3)
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]


async def test_echo(pair: Pair) -> None:
    _, answer = await pair.both(COMPLETIONS, {"prompt": "the sea", "max_tokens": 3, "echo": True})
    assert answer.json["choices"][0]["text"] == "the sea" + expected_text("the sea", 3)


async def test_stream_with_usage(pair: Pair) -> None:
    body = {"prompt": "the sea", "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
    _, answer = await pair.both(COMPLETIONS, body)
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    *chunks, last = answer.events
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected_text("the sea", 5)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 5)
    assert answer.text.endswith("data: [DONE]\n\n")

    options = {"include_usage": True, "continuous_usage_stats": True}
    _, answer = await pair.both(CHAT, {"messages": MESSAGE, "max_tokens": 5, "stream": True, "stream_options": options})
    chunks = answer.events
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == expected_chat_text(MESSAGE, 5)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 4, 5, 5]


async def test_a_one_token_prompt_needs_no_kv(pair: Pair) -> None:
    _, answer = await pair.both(COMPLETIONS, {"prompt": [42], "max_tokens": 5})
    assert answer.json["choices"][0]["text"] == expected_text([42], 5)
    alone = await pair.post(pair.d, COMPLETIONS, {"prompt": [42], "max_tokens": 5}, pair.new_id())
    assert alone.json["choices"][0]["text"] == expected_text([42], 5)


async def test_max_tokens_1(pair: Pair) -> None:
    assert await pair.ask("the sea", max_tokens=1) == expected_text("the sea", 1)


async def test_n_2_with_n_kept_on_prefill(pair: Pair) -> None:
    request_id = pair.new_id()
    _, answer = await pair.both(COMPLETIONS, {"prompt": "the sea", "max_tokens": 5, "n": 2}, request_id)
    texts = [choice["text"] for choice in answer.json["choices"]]
    assert texts == [expected_text("the sea", 5), expected_text("the sea", 5, index=1)]
    assert texts[0] != texts[1]
    assert answer.json["id"] == f"cmpl-{request_id}"


async def test_greedy_with_n_2_is_refused(pair: Pair) -> None:
    answer = await pair.prefill(COMPLETIONS, {"prompt": "a b", "n": 2, "temperature": 0}, pair.new_id())
    assert answer.status == 400
    assert "greedy" in answer.json["error"]["message"]


async def test_the_same_prompt_gives_the_same_answer_again(pair: Pair) -> None:
    assert [await pair.ask("the sea"), await pair.ask("the sea")] == [expected_text("the sea", 8)] * 2


async def test_200_requests_at_once(pair: Pair) -> None:
    async def one(number: int) -> None:
        assert await pair.ask(f"request {number}", 64) == expected_text(f"request {number}", 64)

    await asyncio.gather(*(one(number) for number in range(200)))
    assert pair.d.state()["kv_waiting"] == {}
    assert pair.d.state()["steps"] < 200 * 64 / 4, "requests share steps"


async def test_the_first_request_of_a_pair_takes_longer_on_each_leg(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float, result: Any = None) -> Any:
        if seconds == 1.1:
            slept.append(seconds)
            seconds = 0
        return await real(seconds, result)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    knobs = {"communicator_seconds": 1.1}
    async with running(prefill=knobs, decode=knobs) as pair:
        body = {"prompt": "the sea", "max_tokens": 1}
        extra = []
        for _ in range(2):
            request_id = pair.new_id()
            for leg in (pair.prefill, lambda *args: pair.post(pair.d, *args)):
                slept.clear()
                assert (await leg(COMPLETIONS, body, request_id)).status == 200
                extra.append(len(slept))
        assert extra == [1, 1, 0, 0]


async def test_min_tokens_left_on_prefill_is_a_400(pair: Pair) -> None:
    answer = await pair.prefill(COMPLETIONS, {"prompt": "a b"}, pair.new_id(), min_tokens=2)
    assert answer.status == 400
    error = answer.json["error"]
    assert error["message"] == "min_tokens must be less than or equal to max_tokens=1, got 2."
    assert (error["type"], error["code"]) == ("BadRequestError", 400)


async def test_stream_options_left_on_prefill_are_a_400(pair: Pair) -> None:
    answer = await pair.prefill(CHAT, {"messages": MESSAGE}, pair.new_id(), stream_options={"include_usage": True})
    assert (answer.status, answer.json["error"]["param"]) == (400, "stream_options")


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 0}, {"echo": True, "logprobs": 1}])
async def test_prompt_logprobs_are_right_on_prefill_and_noise_on_decode(pair: Pair, fields: dict[str, Any]) -> None:
    def values(answer: Answer) -> list[float]:
        choice = answer.json["choices"][0]
        if "echo" in fields:
            return choice["logprobs"]["token_logprobs"][1 : len(encode("the sea"))]
        assert choice["prompt_logprobs"][0] is None
        return [entry["logprob"] for position in choice["prompt_logprobs"][1:] for entry in position.values()]

    prefill, decode = await pair.both(COMPLETIONS, {"prompt": "the sea", "max_tokens": 2, **fields})
    assert all(-5 <= value <= 0 for value in values(prefill))
    assert len(values(prefill)) == len(values(decode)) == len(encode("the sea")) - 1
    # vLLM clamps what it puts into logprobs, but only from below.
    assert all(value > 1e29 or value < -1e29 or value == -9999.0 for value in values(decode))


async def assert_dead(pair: Pair, engine: Any) -> None:
    state = await engine.wait_until(lambda s: s["dead"] is not None)
    assert state["dead"]
    for path, body in (
        (COMPLETIONS, {"prompt": "a b", "max_tokens": 1}),
        (CHAT, {"messages": MESSAGE, "max_tokens": 1}),
    ):
        for stream in (False, True):
            later = await pair.post(engine, path, {**body, "stream": stream}, pair.new_id())
            assert later.status == 500
            assert later.json["error"]["type"] == "InternalServerError"
    assert (await pair.get(engine, "/health")).status == 503
    assert (await pair.get(engine, "/v1/models")).status == 200


@pytest.mark.parametrize("request_id", [None, "my-own-id"])
@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_an_id_without_addresses_kills(pair: Pair, leg: str, request_id: str | None) -> None:
    engine = pair.p if leg == "prefill" else pair.d
    answer = await pair.post(engine, COMPLETIONS, {"prompt": "a b", "max_tokens": 1}, request_id)
    assert answer.status == 500
    assert "does not contain hostname and port" in engine.state()["dead"]
    await assert_dead(pair, engine)


async def test_a_death_takes_every_other_request_with_it(pair: Pair) -> None:
    request_id = pair.new_id()
    body = {"prompt": "the sea", "max_tokens": 50, "stream": True}
    await pair.prefill(COMPLETIONS, body, request_id)
    pair.d.faults.hold("schedule", after=2)
    streaming = asyncio.create_task(pair.post(pair.d, COMPLETIONS, body, request_id))
    await pair.d.wait_until(lambda s: s["held_at"] == "schedule")
    killer = asyncio.create_task(pair.post(pair.d, COMPLETIONS, {"prompt": "a b"}, "no addresses"))
    await pair.d.wait_until(lambda s: s["waiting"] == 1)
    pair.d.faults.release()

    assert (await killer).status == 500
    answer = await streaming
    # The stream had begun, so its 200 stands and the error comes as data.
    assert answer.status == 200
    assert answer.events[-1]["error"]["code"] == 500
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "the sea", "max_tokens": 2}),
        (COMPLETIONS, {"prompt": "the sea"}),
        (CHAT, {"messages": MESSAGE, "max_tokens": 1, "max_completion_tokens": 2}),
        (CHAT, {"messages": MESSAGE}),
    ],
)
async def test_more_than_one_token_kills_prefill(pair: Pair, path: str, body: dict[str, Any]) -> None:
    request_id = pair.new_id()
    assert (await pair.post(pair.p, path, body, request_id)).status == 500
    assert "chunked_prefill" in pair.p.state()["dead"]
    # The first step was in order: its KV is on its way, or there.
    assert pair.p.state()["steps"] == 1
    await assert_dead(pair, pair.p)


async def test_responses_take_their_id_from_the_body(pair: Pair) -> None:
    body = {"input": "How deep is the sea?", "max_output_tokens": 1}
    request_id = pair.new_id()
    good = await pair.post(pair.p, "/v1/responses", {**body, "request_id": request_id})
    assert good.status == 200
    decode = {**body, "request_id": request_id, "max_output_tokens": 5}
    answer = await pair.post(pair.d, "/v1/responses", decode)
    assert answer.json["output"][0]["content"][0]["text"] == expected_chat_text(MESSAGE, 5)
    assert answer.json["id"] == request_id

    assert (await pair.post(pair.p, "/v1/responses", body, pair.new_id())).status == 500
    await assert_dead(pair, pair.p)


async def test_the_id_comes_back_in_the_body_with_all_addresses(pair: Pair) -> None:
    request_id = pair.new_id()
    body = {"messages": MESSAGE, "max_tokens": 3, "stream": True}
    _, answer = await pair.both(CHAT, body, request_id)
    assert {chunk["id"] for chunk in answer.events} == {f"chatcmpl-{request_id}"}
    assert "X-Request-Id" not in answer.headers


async def raw_post(address: str, body: dict[str, Any], request_id: str) -> tuple[Any, Any, bytes]:
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw_request(body, request_id))
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(length)
    return reader, writer, head.lower()


def raw_request(body: dict[str, Any], request_id: str) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Request-Id: {request_id}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data


BAD = {"prompt": "a b", "max_tokens": 1, "min_tokens": 5}


async def test_some_400s_close_the_connection_without_saying_so(pair: Pair) -> None:
    reader, writer, head = await raw_post(pair.p.http_address, BAD, pair.new_id())
    assert head.startswith(b"http/1.1 400") and b"connection:" not in head
    assert await reader.read() == b""
    writer.close()


async def test_the_next_request_on_that_connection_is_reset() -> None:
    async with running(prefill={"close_after_400": "reset"}) as pair:
        reader, writer, head = await raw_post(pair.p.http_address, BAD, pair.new_id())
        assert head.startswith(b"http/1.1 400") and b"connection:" not in head
        writer.write(raw_request({"prompt": "a b", "max_tokens": 1}, pair.new_id()))
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        assert pair.p.state()["kv_sent"] == 0


async def test_a_400_of_the_body_s_validation_keeps_the_connection(pair: Pair) -> None:
    bad = {"prompt": "a b", "max_tokens": 1, "stream_options": {"include_usage": True}}
    reader, writer, head = await raw_post(pair.p.http_address, bad, pair.new_id())
    assert head.startswith(b"http/1.1 400")
    writer.write(raw_request({"prompt": "a b", "max_tokens": 1}, pair.new_id()))
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_random_suffixes_of_newer_versions_make_decode_wait_for_ever() -> None:
    knobs = {"randomize_request_ids": True}
    async with running(prefill=knobs, decode=knobs) as pair:
        request_id = pair.new_id()
        await pair.prefill(COMPLETIONS, {"prompt": "the sea"}, request_id)
        victim = asyncio.create_task(pair.post(pair.d, COMPLETIONS, {"prompt": "the sea"}, request_id))
        state = await pair.d.wait_until(lambda s: s["stalled_on"] is not None)
        assert state["stalled_on"].startswith(f"cmpl-{request_id}-0-")
        assert state["stalled_on"] not in state["kv_waiting"]
        await cancelled(victim)


async def test_the_metric_proves_the_transfer(pair: Pair) -> None:
    prompt = f"unseen {uuid.uuid4().hex}"
    await pair.ask(prompt)
    text = (await pair.get(pair.d, "/metrics")).text
    labels = 'engine="0",model_name="sim-model",source="external_kv_transfer"'
    line = f"vllm:prompt_tokens_by_source_total{{{labels}}} {len(encode(prompt)) - 1:.1f}"
    assert line in text.splitlines()
    assert expected_ids(prompt, 8) == expected_ids(encode(prompt), 8)
