"""The official `openai` client against the proxy."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from disagg_sim import expected_chat_text, expected_text
from tests.simulated import CHAT, PROMPT

MODEL: Any = "sim-model"
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
async def client(machine) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=machine.proxy.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


async def test_completions(client, pair) -> None:
    answer = await client.completions.create(model=MODEL, prompt=[PROMPT, "two"], max_tokens=8, n=2, logprobs=1)
    expected = [expected_text(prompt, 8, index=index) for prompt in (PROMPT, "two") for index in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.completion_tokens == 32 and answer.id.startswith("cmpl-")


async def test_streamed_completions(client, pair) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected_text(PROMPT, 8)
    assert chunks[-1].usage.completion_tokens == 8 and len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
async def test_chat(client, pair, limit) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=CHAT, logprobs=True, top_logprobs=2, **{limit: 8}
    )
    assert answer.choices[0].message.content == expected_chat_text(CHAT, 8)
    assert len(answer.choices[0].logprobs.content) == 8


async def test_streamed_chat(client, pair) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=8, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == expected_chat_text(CHAT, 8)


async def test_the_stream_helper_assembles_a_tool_call(client, pair) -> None:
    async with client.chat.completions.stream(
        model=MODEL, messages=CHAT, tools=[TOOL], tool_choice="required"
    ) as stream:
        answer = await stream.get_final_completion()
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments).keys() == {"city"}


async def test_a_conversation_with_a_tool(client, pair) -> None:
    messages: list[Any] = list(CHAT)
    first = await client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL])
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls" and message.tool_calls
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny"}]
    second = await client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL], max_tokens=6)
    assert second.choices[0].message.content and not second.choices[0].message.tool_calls


async def test_models(client, pair) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "disagg_sim"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_a_raw_answer_has_the_clients_request_id(client, pair) -> None:
    raw = await client.completions.with_raw_response.create(
        model=MODEL, prompt=PROMPT, max_tokens=2, extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine" and raw.parse()._request_id == "mine"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_error_classes_of_what_the_proxy_refuses(client, pair, stream) -> None:
    async def ask(**more: Any) -> Any:
        return await client.chat.completions.create(**{"model": MODEL, "messages": CHAT, "stream": stream, **more})

    with pytest.raises(openai.BadRequestError) as bad:
        await ask(extra_body={"use_beam_search": True})
    assert (bad.value.code, bad.value.param, bad.value.type) == (
        "unsupported_parameter",
        "use_beam_search",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as unknown:
        await ask(model="other")
    assert unknown.value.code == "model_not_found" and "sim-model" in unknown.value.message
    with pytest.raises(openai.BadRequestError, match="at least 1"):
        await ask(max_tokens=-1)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        await ask(max_tokens=10**9)


async def test_error_classes_of_what_an_engine_refuses(client, pair) -> None:
    kinds = {
        401: openai.AuthenticationError,
        403: openai.PermissionDeniedError,
        409: openai.ConflictError,
        422: openai.UnprocessableEntityError,
        500: openai.InternalServerError,
    }
    for status, kind in kinds.items():
        error = {"error": {"message": "Not now", "type": "T", "param": None, "code": status}}
        pair[0].faults.fail_next(status, json.dumps(error), {"Retry-After": "7"}, path="/v1/completions")
        with pytest.raises(kind) as failed:
            await client.completions.create(model=MODEL, prompt=PROMPT)
        assert "Not now" in failed.value.message and failed.value.response.headers["Retry-After"] == "7"
        assert failed.value.status_code == (status if status < 500 else 502)
    for status in (429, 503):
        pair[0].faults.fail_next(status, b"{}", {"Retry-After": "7"}, path="/v1/completions")
        with pytest.raises(openai.InternalServerError, match="busy") as failed:
            await client.completions.create(model=MODEL, prompt=PROMPT)
        assert failed.value.status_code == 503 and failed.value.response.headers["Retry-After"] == "7"


async def test_no_pair_is_an_internal_server_error(client) -> None:
    with pytest.raises(openai.InternalServerError) as failed:
        await client.completions.create(model=MODEL, prompt=PROMPT)
    assert (failed.value.status_code, failed.value.code) == (503, "no_pair")


@pytest.mark.settings(api_key="right")
async def test_the_key(client, pair) -> None:
    with pytest.raises(openai.AuthenticationError) as wrong:
        await client.completions.create(model=MODEL, prompt=PROMPT)
    assert wrong.value.code == "invalid_api_key"
    answer = await client.with_options(api_key="right").completions.create(model=MODEL, prompt=PROMPT, max_tokens=3)
    assert answer.choices[0].text == expected_text(PROMPT, 3)


async def test_a_stream_that_breaks_is_an_error_of_the_connection(client, pair) -> None:
    pair[1].faults.cut_stream_after(3)
    stream = await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, stream=True)
    text = ""
    with pytest.raises(openai.APIConnectionError):
        async for chunk in stream:
            text += chunk.choices[0].text
    assert text == expected_text(PROMPT, 3)


async def test_what_a_pair_cannot_serve(client, pair) -> None:
    with pytest.raises(openai.InternalServerError) as failed:
        await client.embeddings.create(model=MODEL, input="x")
    assert failed.value.status_code == 501
    with pytest.raises(openai.InternalServerError) as failed:
        await client.responses.create(model=MODEL, input="x")
    assert failed.value.status_code == 501 and "chat/completions" in failed.value.message
