"""The official `anthropic` client against the proxy."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

from disagg_sim import encode, expected_chat_text, render_chat
from tests.simulated import CHAT

MODEL: Any = "sim-model"
ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "messages": CHAT}
TOOL: Any = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
LENGTH = len(encode(render_chat(CHAT)))


@pytest.fixture
async def client(machine) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=machine.proxy.url, api_key="none", max_retries=0) as found:
        yield found


async def test_a_message(client, pair) -> None:
    answer = await client.messages.create(**ASK)
    assert answer.content[0].text == expected_chat_text(CHAT, 8)
    assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.output_tokens) == ("max_tokens", LENGTH, 8)
    assert answer.type == "message" and "_addr_" not in answer.id


async def test_system_and_blocks(client, pair) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    answer = await client.messages.create(**{**ASK, "messages": messages}, system="Be brief.")
    seen = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert answer.content[0].text == expected_chat_text(seen, 8)


async def test_a_streamed_message(client, pair) -> None:
    async with client.messages.stream(**ASK) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        answer = await stream.get_final_message()
    assert text == answer.content[0].text == expected_chat_text(CHAT, 8)
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 8)


async def test_raw_events_of_a_stream(client, pair) -> None:
    kinds = [event.type async for event in await client.messages.create(**ASK, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("content_block_delta") == 8


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
async def test_a_tool_whose_result_goes_back(client, pair, choice) -> None:
    options: dict[str, Any] = {**ASK, "max_tokens": 300, "tools": [TOOL]}
    async with client.messages.stream(**options, tool_choice=choice) as stream:
        first = await stream.get_final_message()
    [use] = first.content
    assert (use.type, use.name, use.input.keys()) == ("tool_use", "get_weather", {"city"})
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "Sunny"}
    turns: Any = [*CHAT, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = await client.messages.create(**{**options, "messages": turns, "max_tokens": 6})
    assert second.content[0].type == "text" and second.content[0].text


async def test_counting_tokens(client, pair) -> None:
    assert (await client.messages.count_tokens(model=MODEL, messages=CHAT)).input_tokens == LENGTH


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_error_classes(client, pair, stream) -> None:
    async def ask(**more: Any) -> Any:
        return await client.messages.create(**{**ASK, "stream": stream, **more})

    with pytest.raises(anthropic.NotFoundError, match=r"other.*sim-model"):
        await ask(model="other")
    with pytest.raises(anthropic.BadRequestError, match="chat template"):
        await ask(extra_body={"chat_template_kwargs": {"chat_template": "x"}})
    with pytest.raises(anthropic.BadRequestError, match="must be positive"):
        await ask(max_tokens=0)
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        await ask(max_tokens=20_000, messages=[{"role": "user", "content": "a" * 20_000}])
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        await ask(messages=[{"role": "user", "content": "a" * 40_000}])
    no = json.dumps({"type": "error", "error": {"type": "rate_limit_error", "message": "No"}})
    pair[0].faults.fail_next(429, no, path="/v1/messages")
    with pytest.raises(anthropic.APIStatusError, match="busy") as failed:
        await ask()
    assert failed.value.status_code == 503
    pair[0].faults.fail_next(500, path="/v1/messages")
    with pytest.raises(anthropic.InternalServerError) as failed:
        await ask()
    assert failed.value.status_code == 502


async def test_no_pair_is_an_error_of_the_server(client) -> None:
    with pytest.raises(anthropic.APIStatusError) as failed:
        await client.messages.create(**ASK)
    assert (failed.value.status_code, failed.value.response.headers["Retry-After"]) == (503, "3")
    assert failed.value.body["type"] == "error" and failed.value.body["error"]["code"] == "no_pair"


@pytest.mark.settings(api_key="right")
async def test_the_key(client, pair) -> None:
    with pytest.raises(anthropic.AuthenticationError):
        await client.messages.create(**ASK)
    for given in ({"api_key": "right"}, {"api_key": None, "auth_token": "right"}):
        answer = await client.with_options(**given).messages.create(**ASK)
        assert answer.content[0].text == expected_chat_text(CHAT, 8)
