"""The official OpenAI and Anthropic clients read what decode answers, tools and structured outputs included."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

from disagg_sim import expected_chat_text, expected_text

from .pair import CHAT, COMPLETIONS, MESSAGES, Pair

MESSAGE: Any = [{"role": "user", "content": "How deep is the sea?"}]
PARAMETERS = {"type": "object", "properties": {"metres": {"type": "integer"}, "where": {"type": "string"}}}
TOOLS: Any = [{"type": "function", "function": {"name": "depth", "parameters": PARAMETERS}}]
NAMED: Any = {"type": "function", "function": {"name": "depth"}}


async def headers(pair: Pair, path: str, body: dict[str, Any]) -> dict[str, str]:
    """Do the prefill leg; the id that decode then needs."""
    request_id = pair.new_id()
    answer = await pair.prefill(path, body, request_id, **({"stream": True} if path == MESSAGES else {}))
    assert answer.status == 200, answer.text
    return {"X-Request-Id": request_id}


@pytest.fixture
async def client(pair: Pair):
    async with openai.AsyncOpenAI(base_url=f"http://{pair.d.http_address}/v1", api_key="x", max_retries=0) as one:
        yield one


async def test_openai_completions(pair: Pair, client: openai.AsyncOpenAI) -> None:
    body: dict[str, Any] = {"model": "sim-model", "prompt": "the sea", "max_tokens": 5}
    extra = await headers(pair, COMPLETIONS, body)
    answer = await client.completions.create(**body, extra_headers=extra)
    assert answer.choices[0].text == expected_text("the sea", 5)


async def test_openai_chat_stream(pair: Pair, client: openai.AsyncOpenAI) -> None:
    body: dict[str, Any] = {"model": "sim-model", "messages": MESSAGE, "max_tokens": 5}
    extra = await headers(pair, CHAT, body)
    stream = await client.chat.completions.create(**body, stream=True, extra_headers=extra)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == expected_chat_text(MESSAGE, 5)


@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
async def test_openai_tools(pair: Pair, client: openai.AsyncOpenAI, choice: Any) -> None:
    body: dict[str, Any] = {"model": "sim-model", "messages": MESSAGE, "max_tokens": 200, "tools": TOOLS}
    body["tool_choice"] = choice
    extra = await headers(pair, CHAT, body)
    answer = await client.chat.completions.create(**body, extra_headers=extra)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function" and call.function.name == "depth"
    arguments = call.function.arguments
    assert json.loads(arguments).keys() == PARAMETERS["properties"].keys()
    assert answer.choices[0].finish_reason == ("stop" if choice is NAMED else "tool_calls")

    extra = await headers(pair, CHAT, body)
    async with client.chat.completions.stream(**body, extra_headers=extra) as stream:
        final = await stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls or ()
    assert (streamed.function.name, streamed.function.arguments) == ("depth", arguments)


async def test_openai_json_schema(pair: Pair, client: openai.AsyncOpenAI) -> None:
    schema = {"name": "depth", "schema": PARAMETERS}
    body: dict[str, Any] = {"model": "sim-model", "messages": MESSAGE, "max_tokens": 200}
    body["response_format"] = {"type": "json_schema", "json_schema": schema}
    extra = await headers(pair, CHAT, body)
    answer = await client.chat.completions.create(**body, extra_headers=extra)
    assert json.loads(answer.choices[0].message.content or "").keys() == PARAMETERS["properties"].keys()


async def test_openai_errors(pair: Pair, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.chat.completions.create(model="other", messages=MESSAGE)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.chat.completions.create(model="sim-model", messages=MESSAGE, temperature=-1)


async def test_anthropic(pair: Pair) -> None:
    body: dict[str, Any] = {"model": "sim-model", "messages": MESSAGE, "max_tokens": 5}
    base = f"http://{pair.d.http_address}"
    async with anthropic.AsyncAnthropic(base_url=base, api_key="x", max_retries=0) as client:
        answer = await client.messages.create(**body, extra_headers=await headers(pair, MESSAGES, body))
        assert answer.content[0].text == expected_chat_text(MESSAGE, 5)  # type: ignore[union-attr]

        extra = await headers(pair, MESSAGES, body)
        async with client.messages.stream(**body, extra_headers=extra) as stream:
            assert "".join([text async for text in stream.text_stream]) == expected_chat_text(MESSAGE, 5)
            final = await stream.get_final_message()
        assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 5)


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "depth"}])
async def test_anthropic_tools(pair: Pair, choice: Any) -> None:
    body: dict[str, Any] = {"model": "sim-model", "messages": MESSAGE, "max_tokens": 200, "tool_choice": choice}
    body["tools"] = [{"name": "depth", "input_schema": PARAMETERS}]
    base = f"http://{pair.d.http_address}"
    async with anthropic.AsyncAnthropic(base_url=base, api_key="x", max_retries=0) as client:
        answer = await client.messages.create(**body, extra_headers=await headers(pair, MESSAGES, body))
        (call,) = answer.content
        assert call.type == "tool_use" and call.input.keys() == PARAMETERS["properties"].keys()
        extra = await headers(pair, MESSAGES, body)
        async with client.messages.stream(**body, extra_headers=extra) as stream:
            final = await stream.get_final_message()
        assert final.content[0].input == call.input  # type: ignore[union-attr]


async def test_anthropic_counts_tokens(pair: Pair) -> None:
    body = {"model": "sim-model", "messages": MESSAGE}
    answer = await pair.post(pair.p, "/v1/messages/count_tokens", body)
    tokens = (await pair.post(pair.p, "/tokenize", {"messages": MESSAGE})).json["count"]
    assert answer.json["input_tokens"] == tokens


async def test_openai_responses_stream(pair: Pair, client: openai.AsyncOpenAI) -> None:
    request_id = pair.new_id()
    body = {"input": "How deep is the sea?", "request_id": request_id}
    assert (await pair.post(pair.p, "/v1/responses", {**body, "max_output_tokens": 1})).status == 200
    async with client.responses.stream(
        model="sim-model", input=body["input"], max_output_tokens=5, extra_body={"request_id": request_id}
    ) as stream:
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
    assert text == expected_chat_text(MESSAGE, 5)
