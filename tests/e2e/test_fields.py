"""What the fields of a request become on each leg, and that none harms an engine. Rules: docs/request-fields.md."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.simulated import REQUESTS

COMPLETIONS, CHATS, MESSAGES = REQUESTS

GONE = object()
# What the client changes in a plain request, and what prefill gets beside max_tokens 1 and stream false.
ON_PREFILL: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (COMPLETIONS, {}, {}),
    (COMPLETIONS, {"max_tokens": GONE}, {}),
    (COMPLETIONS, {"max_tokens": 30, "min_tokens": 20}, {"min_tokens": GONE}),
    (COMPLETIONS, {"min_tokens": 1}, {}),
    (COMPLETIONS, {"stream": True}, {}),
    (COMPLETIONS, {"stream": True, "stream_options": {"include_usage": True}}, {"stream_options": GONE}),
    (COMPLETIONS, {"n": 3, "best_of": 3}, {}),
    (COMPLETIONS, {"use_beam_search": False, "made_up": [1, {"a": None}]}, {}),
    (COMPLETIONS, {"logprobs": 2, "ignore_eos": True, "stop": ["x"], "user": "u"}, {}),
    (COMPLETIONS, {"temperature": 0.5, "seed": 7, "cache_salt": "s", "priority": 1}, {}),
    (COMPLETIONS, {"truncate_prompt_tokens": 4}, {}),
    (CHATS, {}, {}),
    (CHATS, {"max_tokens": GONE}, {}),
    (CHATS, {"max_tokens": None}, {}),
    (CHATS, {"max_completion_tokens": 9}, {"max_completion_tokens": 1}),
    (CHATS, {"max_tokens": GONE, "max_completion_tokens": 9}, {"max_completion_tokens": 1}),
    (CHATS, {"max_completion_tokens": None}, {}),
    (CHATS, {"logprobs": True, "top_logprobs": 2}, {}),
    (CHATS, {"chat_template_kwargs": {"enable_thinking": False}}, {}),
    (CHATS, {"reasoning_effort": "low", "documents": [{"text": "d"}]}, {}),
    (MESSAGES, {}, {}),
    (MESSAGES, {"stream": True, "stop_sequences": ["x"]}, {}),
    (MESSAGES, {"system": "Be brief.", "metadata": {"user_id": "u"}}, {}),
]


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**base, **changes}.items() if value is not GONE}


async def test_null_is_the_default_limit_of_completions(machine, pair) -> None:
    """openai's client sends it for ``max_tokens=None``."""
    status, _, answer = await machine.send(COMPLETIONS, {**REQUESTS[COMPLETIONS], "max_tokens": None})
    assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] <= 16
    await machine.unharmed(*pair)


async def test_prefill_gets_one_token_to_generate_and_otherwise_the_same(machine, pair) -> None:
    prefill, decode = pair
    for path, change, on_prefill in ON_PREFILL:
        body = changed(REQUESTS[path], change)
        status, _, answer = await machine.send(path, body)
        assert status == 200, (body, answer)
        got = prefill.received(path)[-1].json
        assert got == changed(body, {"max_tokens": 1, "stream": False, **on_prefill}), body
        assert decode.received(path)[-1].json == body
    await machine.unharmed(*pair)


IMAGE = {
    CHATS: {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    MESSAGES: {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
}


@pytest.mark.parametrize("path", IMAGE)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_image_for_a_text_model_is_the_clients_mistake(machine, pair, path: str, stream: bool) -> None:
    """On /v1/messages vLLM up to 0.23 answers 500."""
    body = {**REQUESTS[path], "messages": [{"role": "user", "content": [IMAGE[path]]}], "stream": stream}
    status, _, answer = await machine.send(path, body)
    assert status == 400 and b"At most 0 image(s)" in answer
    assert all(machine.proxy.instance(engine.http_address).failures_total == 0 for engine in pair)
    await machine.unharmed(*pair)


BAD = [
    b"",
    b" ",
    b"no",
    b"[]",
    b'"text"',
    b"null",
    b"1",
    b"{",
    b'{"a":1,}',
    b'{"max_tokens":NaN}',
    b'{"a":-Infinity}',
    b"\xff\xfe\xff",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"seed":' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("path", REQUESTS)
async def test_a_body_that_is_no_json_object_is_refused(machine, pair, path) -> None:
    for raw in BAD:
        status, headers, answer = await machine.send(path, raw)
        assert (status, headers["Content-Type"]) == (400, "application/json"), (raw[:40], answer)
        assert json.loads(answer)["error"]["message"]
    assert not any(engine.received(path) for engine in pair)


async def test_json_near_the_limit_of_nesting_is_answered_and_never_a_bug(machine, pair) -> None:
    for depth in range(880, 1010, 2):
        raw = b'{"prompt":"San Francisco is a","max_tokens":2,"x":' + b"[" * depth + b"]" * depth + b"}"
        status, _, answer = await machine.send(COMPLETIONS, raw)
        assert status in (200, 400), (depth, answer)
    await machine.unharmed(*pair)


async def test_an_infinite_limit_is_left_for_the_engines_to_refuse(machine, pair) -> None:
    for path in REQUESTS:
        raw = json.dumps({**REQUESTS[path], "max_tokens": float("inf")}).replace("Infinity", "1e400")
        status, _, answer = await machine.send(path, raw.encode())
        assert status == 400, answer
        assert not pair[1].received(path)
    await machine.unharmed(*pair)


async def test_another_content_type_is_for_the_engine_to_refuse(machine, pair) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, answer = await machine.send(COMPLETIONS, REQUESTS[COMPLETIONS], **{"Content-Type": content_type})
        assert status == 400 and b"Unsupported Media Type" in answer
    assert not pair[1].received(COMPLETIONS)
