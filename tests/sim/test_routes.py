"""The other routes, and the errors, in vLLM's words and shapes."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from disagg_sim import SimConfig, SimConfigError, SimEngine

from .pair import CHAT, COMPLETIONS, MESSAGES, Pair, running

MESSAGE = [{"role": "user", "content": "hi"}]


async def test_small_routes(pair: Pair) -> None:
    assert (await pair.get(pair.p, "/health")).status == 200
    assert (await pair.get(pair.p, "/ping")).status == 200
    assert (await pair.get(pair.p, "/version")).json == {"version": "0.21.0"}
    assert (await pair.get(pair.p, "/sim/state")).json["role"] == "prefill"
    assert (await pair.post(pair.p, "/start_profile", {})).status == 200
    assert pair.p.state()["profiling"]
    assert (await pair.post(pair.p, "/stop_profile", {})).status == 200
    assert not pair.p.state()["profiling"]
    metrics = (await pair.get(pair.p, "/metrics")).text
    assert "# TYPE vllm:num_requests_running gauge" in metrics


async def test_models_and_aliases() -> None:
    async with running(decode={"models": ("big", "alias")}) as pair:
        cards = (await pair.get(pair.d, "/v1/models")).json["data"]
        assert [card["id"] for card in cards] == ["big", "alias"]
        answer = await pair.post(pair.d, COMPLETIONS, {"model": "alias", "prompt": [1], "max_tokens": 1})
        assert answer.json["model"] == "big"


@pytest.mark.parametrize("text", ["", "the sea, naïve 東京 🙂 <|im_end|>", "\x00\n<|token_70000|>", "<|token_5|>"])
async def test_tokenize_and_detokenize_are_inverse(pair: Pair, text: str) -> None:
    tokens = (await pair.post(pair.d, "/tokenize", {"prompt": text})).json
    assert tokens["count"] == len(tokens["tokens"])
    assert (await pair.post(pair.d, "/detokenize", {"tokens": tokens["tokens"]})).json == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "status", "needle"),
    [
        (COMPLETIONS, {"model": "other", "prompt": "a"}, 404, "`other` does not exist"),
        (CHAT, {"model": "other", "messages": MESSAGE}, 404, "`other` does not exist"),
        (COMPLETIONS, {}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ""}, 400, "non-empty"),
        (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": []}, 400, "empty"),
        (COMPLETIONS, {"prompt": [151_936]}, 400, "out of vocabulary"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens must be at least 1"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "7"}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature"),
        (COMPLETIONS, {"prompt": "a", "top_p": 0}, 400, "top_p"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, 400, "n must be at least 1"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "max allowed"),
        (COMPLETIONS, {"prompt": "a", "logprobs": -1}, 400, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "stop": [""]}, 400, "stop"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        (COMPLETIONS, {"prompt": "a", "stream": True, "prompt_logprobs": 1}, 400, "stream"),
        (COMPLETIONS, {"prompt": "a", "stream": True, "use_beam_search": True}, 400, "beam"),
        (COMPLETIONS, {"prompt": "a", "response_format": {"type": "json_schema"}}, 400, "json_schema"),
        (CHAT, {}, 400, "messages"),
        (CHAT, {"messages": [{"content": "hi"}]}, 400, "messages"),
        (CHAT, {"messages": MESSAGE, "top_logprobs": 2}, 400, "logprobs"),
        (CHAT, {"messages": MESSAGE, "tools": []}, 400, "tools"),
        (CHAT, {"messages": MESSAGE, "tool_choice": "auto"}, 400, "tools"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image"),
        (MESSAGES, {"model": "sim-model", "messages": MESSAGE}, 400, "max_tokens"),
        (MESSAGES, {"messages": MESSAGE, "max_tokens": 1}, 400, "Model is required"),
        (MESSAGES, {"model": "other", "messages": MESSAGE, "max_tokens": 1}, 404, "`other` does not exist"),
        ("/nowhere", {}, 404, "Not Found"),
        ("/v1/models", {}, 405, "Method Not Allowed"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/tokenize", {}, 400, "prompt"),
    ],
)
async def test_refusals(pair: Pair, path: str, body: dict[str, Any], status: int, needle: str) -> None:
    answer = await pair.post(pair.d, path, body, pair.new_id())
    assert answer.status == status, answer.text
    error = answer.json["error"]
    assert needle in error["message"]
    assert path == MESSAGES or error["code"] == status
    assert pair.d.state()["dead"] is None


@pytest.mark.parametrize(
    ("data", "content_type", "needle"),
    [
        (b"{", "application/json", "json_invalid"),
        (b"[1]", "application/json", "dictionary"),
        (b"\xff\xfe\xfa", "application/json", "parsing the body"),
        (b"[" * 100_000, "application/json", "json_invalid"),
        (b'{"prompt":"a"}', "text/plain", "Unsupported Media Type"),
    ],
)
async def test_bodies_that_are_no_request(pair: Pair, data: bytes, content_type: str, needle: str) -> None:
    url = f"http://{pair.d.http_address}{COMPLETIONS}"
    async with pair.http.post(url, data=data, headers={"Content-Type": content_type}) as response:
        assert response.status == 400
        assert needle in (await response.json())["error"]["message"]


async def test_an_error_of_the_engine_comes_inside_a_stream_s_200(pair: Pair) -> None:
    answer = await pair.post(pair.d, COMPLETIONS, {"prompt": [151_936], "stream": True}, pair.new_id())
    assert answer.status == 200
    assert answer.events[0]["error"]["code"] == 400


async def test_api_key_guards_v1_only() -> None:
    async with running(decode={"api_key": "secret"}) as pair:
        url = f"http://{pair.d.http_address}"
        for key in (None, "Bearer wrong", "Basic secret"):
            headers = {"Authorization": key} if key else {}
            async with pair.http.get(f"{url}/v1/models", headers=headers) as response:
                assert response.status == 401
                assert await response.json() == {"error": "Unauthorized"}
        async with pair.http.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"}) as response:
            assert response.status == 200
        assert (await pair.get(pair.d, "/health")).status == 200
        assert (await pair.post(pair.d, "/tokenize", {"prompt": "a"})).status == 200


async def test_request_id_header_comes_back_when_asked_for() -> None:
    async with running(decode={"enable_request_id_headers": True}) as pair:
        request_id = pair.new_id()
        for stream in (False, True):
            body = {"prompt": [1], "max_tokens": 1, "stream": stream}
            answer = await pair.post(pair.d, COMPLETIONS, body, request_id)
            assert answer.headers["X-Request-Id"] == request_id


async def test_tools_without_a_parser_are_refused_alike() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    knobs = {"enable_auto_tool_choice": False}
    async with running(prefill=knobs, decode=knobs) as pair:
        body = {"messages": MESSAGE, "tools": [tool], "max_tokens": 1}
        for engine in (pair.p, pair.d):
            answer = await pair.post(engine, CHAT, body, pair.new_id())
            assert answer.status == 400 and "--tool-call-parser" in answer.json["error"]["message"]


async def test_requests_are_recorded_as_they_arrived(pair: Pair) -> None:
    request_id = pair.new_id()
    await pair.prefill(COMPLETIONS, {"prompt": "a b"}, request_id)
    (seen,) = pair.p.received(COMPLETIONS)
    assert (seen.method, seen.headers["x-request-id"]) == ("POST", request_id)
    assert seen.json == {"prompt": "a b", "max_tokens": 1}
    assert seen.body == b'{"prompt": "a b", "max_tokens": 1}'


async def test_ipv6() -> None:
    async with running(prefill={"host": "::1"}, decode={"host": "::1"}) as pair:
        assert pair.p.http_address.startswith("[::1]:")
        assert await pair.ask("the sea")


@pytest.mark.parametrize(
    "knobs",
    [
        {"role": "both"},
        {"port": 70_000},
        {"models": ()},
        {"kv_layers": 1},
        {"time_per_output_token": -1},
        {"ping_seconds": 0},
        {"exit_after_death_seconds": -1},
        {"close_after_400": "maybe"},
    ],
)
def test_knobs_are_checked(knobs: dict[str, Any]) -> None:
    with pytest.raises(SimConfigError, match=next(iter(knobs))):
        SimConfig(**knobs)


async def test_a_port_that_is_taken_is_an_error_that_names_it(pair: Pair) -> None:
    port = int(pair.p.http_address.rpartition(":")[2])
    second = SimEngine(SimConfig(port=port))
    with pytest.raises(OSError, match=f"cannot bind 127.0.0.1:{port}"):
        await second.start()
    await second.stop()


async def test_stop_answers_what_still_hangs(pair: Pair) -> None:
    async with aiohttp.ClientSession() as http:
        body = {"prompt": "a b", "stream": True}
        headers = {"X-Request-Id": pair.new_id()}
        async with http.post(f"http://{pair.d.http_address}{COMPLETIONS}", json=body, headers=headers) as response:
            await pair.d.wait_until(lambda s: s["stalled_on"] is not None)
            await pair.d.stop()
            assert '"code":500' in await response.text()


WEATHER = {"name": "weather", "description": "tells it", "input_schema": {"type": "object"}}


async def test_an_anthropic_conversation_becomes_the_same_prompt_on_both_legs(pair: Pair) -> None:
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "Is it raining?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm"},
                {"type": "text", "text": "One moment."},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"where": "here"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "So?"},
                {"type": "text", "text": "Tell me."},
            ],
        },
    ]
    body = {
        "model": "sim-model",
        "max_tokens": 90,
        "system": [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}],
        "messages": conversation,
        "tools": [WEATHER],
        "tool_choice": {"type": "none"},
        "stop_sequences": ["zzz"],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    first, answer = await pair.both(MESSAGES, body)
    assert first.status == answer.status == 200
    assert answer.json["content"][0]["text"].startswith(first.json["content"][0]["text"])
    assert answer.json["usage"]["input_tokens"] == first.json["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("fields", "needle"),
    [
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tool_choice": {"type": "sometimes"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "other"}, "tools": [WEATHER]}, "does not match"),
    ],
)
async def test_anthropic_requests_that_are_none(pair: Pair, fields: dict[str, Any], needle: str) -> None:
    body = {"model": "sim-model", "messages": MESSAGE, "max_tokens": 5, **fields}
    answer = await pair.post(pair.d, MESSAGES, body, pair.new_id())
    assert answer.status == 400 and needle in answer.json["error"]["message"]


async def test_an_image_on_v1_messages_is_a_500_of_a_text_model(pair: Pair) -> None:
    content = [{"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}]
    body = {"model": "sim-model", "messages": [{"role": "user", "content": content}], "max_tokens": 5}
    assert (await pair.post(pair.d, MESSAGES, body, pair.new_id())).status == 500


async def test_a_responses_stream_that_kills_its_engine_breaks_off(pair: Pair) -> None:
    """Its error is no event of this API (vLLM 0.32, ``responses_stream_generator``)."""
    with pytest.raises(aiohttp.ClientPayloadError):
        await pair.post(pair.d, "/v1/responses", {"model": "sim-model", "input": "hi", "stream": True})


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, MESSAGES])
async def test_a_stream_that_kills_its_engine_ends_with_an_error_inside_its_200(pair: Pair, path: str) -> None:
    body = {"model": "sim-model", "prompt": "a b", "messages": MESSAGE, "max_tokens": 5, "stream": True}
    answer = await pair.post(pair.d, path, body, "no addresses")
    assert answer.status == 200
    error = answer.events[-1]["error"]
    assert "EngineCore encountered an issue" in error["message"]


async def test_responses_without_input_are_refused(pair: Pair) -> None:
    assert (await pair.post(pair.d, "/v1/responses", {"model": "sim-model"})).status == 400
    body = {"model": "other", "input": [{"role": "user", "content": "hi"}], "instructions": "brief"}
    assert (await pair.post(pair.d, "/v1/responses", body)).status == 404


async def test_chat_continues_and_echoes_the_last_message(pair: Pair) -> None:
    conversation = [*MESSAGE, {"role": "assistant", "content": "The sea"}]
    body = {"messages": conversation, "max_tokens": 3, "echo": True, "add_generation_prompt": False}
    _, answer = await pair.both(CHAT, {**body, "continue_final_message": True, "prompt_logprobs": None})
    assert answer.json["choices"][0]["message"]["content"].startswith("The sea ")
    both = {**body, "continue_final_message": True, "add_generation_prompt": True}
    assert (await pair.post(pair.d, CHAT, both, pair.new_id())).status == 400
    template = {"messages": MESSAGE, "chat_template": "{{ x }}"}
    assert (await pair.post(pair.d, CHAT, template, pair.new_id())).status == 400


async def test_return_token_ids(pair: Pair) -> None:
    body = {"prompt": [42], "max_tokens": 3, "return_token_ids": True}
    choice = (await pair.post(pair.d, COMPLETIONS, body)).json["choices"][0]
    assert (choice["prompt_token_ids"], len(choice["token_ids"])) == ([42], 3)
    events = (await pair.post(pair.d, COMPLETIONS, {**body, "stream": True})).events
    assert [event["choices"][0]["prompt_token_ids"] for event in events] == [[42], None, None]
    assert [event["choices"][0]["token_ids"][0] for event in events] == choice["token_ids"]


async def test_stop_strings_end_both_kinds_of_answer_alike(pair: Pair) -> None:
    whole = (await pair.post(pair.d, COMPLETIONS, {"prompt": [42], "max_tokens": 20})).json["choices"][0]["text"]
    stop = whole.split(" ")[9]
    body = {"prompt": [42], "max_tokens": 20, "stop": stop}
    choice = (await pair.post(pair.d, COMPLETIONS, body)).json["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        whole[: whole.index(stop)],
        "stop",
        stop,
    )
    events = (await pair.post(pair.d, COMPLETIONS, {**body, "stream": True})).events
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
    assert events[-1]["choices"][0]["stop_reason"] == stop
    await pair.d.wait_until(lambda s: s["running"] == 0)


async def test_stop_token_ids(pair: Pair) -> None:
    body = {"prompt": [42], "max_tokens": 20, "return_token_ids": True}
    ids = (await pair.post(pair.d, COMPLETIONS, body)).json["choices"][0]["token_ids"]
    choice = (await pair.post(pair.d, COMPLETIONS, {**body, "stop_token_ids": [ids[5]]})).json["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids[5])
    assert choice["token_ids"] == ids[: ids.index(ids[5]) + 1]


async def test_a_connection_that_asks_nothing_stays_open_as_with_uvicorn() -> None:
    engine = SimEngine(SimConfig(keepalive_seconds=0.05))
    await engine.start()
    host, port = engine.http_address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(), 0.2)
    finally:
        writer.close()
        await engine.stop()
