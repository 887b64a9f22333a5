"""What the fields of a request become on each leg, and that none harms an engine. Rules: docs/request-fields.md."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disagg_proxy.sim import expected_text
from tests.machine import CHAT, PROMPT, REQUESTS, RIGHT, text_of

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


STEERING = {
    "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.0.0.1"},
    "request_id": "___prefill_addr_10.0.0.1:1___decode_addr_10.0.0.1:2_00",
    "vllm_xargs": {"kv_transfer_params": "{}", "request_id": "x", "kept": 1},
}


@pytest.mark.parametrize("path", REQUESTS)
async def test_what_steers_the_kv_transfer_reaches_neither_engine(machine, pair, path) -> None:
    status, _, body = await machine.post(path, {**REQUESTS[path], **STEERING, "user": "u"})
    assert (status, text_of(body)) == (200, RIGHT[path])
    for engine, limit in zip(pair, (1, 8), strict=True):
        got = engine.received(path)[0].json
        assert not {"kv_transfer_params", "request_id"} & got.keys()
        assert got["vllm_xargs"] == {"kept": 1}
        assert (got["user"], got["max_tokens"]) == ("u", limit)


IMAGE = {"type": "image_url", "image_url": {"url": "https://a/b.png"}}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"max_tokens": None}, "max_tokens"),
    (COMPLETIONS, {"min_tokens": 9}, "min_tokens"),
    (COMPLETIONS, {"use_beam_search": True}, "use_beam_search"),
    (COMPLETIONS, {"use_beam_search": 1}, "use_beam_search"),
    (COMPLETIONS, {"use_beam_search": "on"}, "use_beam_search"),
    (COMPLETIONS, {"prompt_embeds": "AAAA"}, "prompt_embeds"),
    (COMPLETIONS, {"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
    (COMPLETIONS, {"truncate_prompt_tokens": "-1"}, "truncate_prompt_tokens"),
    (COMPLETIONS, {"prompt_logprobs": 1}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 0}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": False}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 0, "max_tokens": 1, "stream": True}, "prompt_logprobs"),
    (COMPLETIONS, {"echo": True, "logprobs": 1}, "echo"),
    (COMPLETIONS, {"model": 5}, "model"),
    (CHATS, {"use_beam_search": "true"}, "use_beam_search"),
    (CHATS, {"min_tokens": 9, "max_completion_tokens": 4}, "min_tokens"),
    (CHATS, {"chat_template": "{{ now() }}"}, "chat_template"),
    (CHATS, {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template"),
    (CHATS, {"echo": True}, "echo"),
    (CHATS, {"echo": True, "top_logprobs": 2, "logprobs": True}, "echo"),
    (CHATS, {"prompt_logprobs": 0}, "prompt_logprobs"),
    (CHATS, {"prompt_logprobs": 0, "max_tokens": 1, "tool_choice": "required"}, "prompt_logprobs"),
    (CHATS, user(IMAGE), "messages"),
    (CHATS, user({"type": "image_url", "image_url": "file:///etc/passwd"}), "messages"),
    (CHATS, user({"type": "audio_url", "audio_url": {"url": "HTTP://a/b"}}), "messages"),
    (CHATS, user({**IMAGE, "image_url": {"url": "data:image/png;base64,AA=="}, "uuid": "1"}), "messages"),
    (CHATS, user({"type": "image_embeds", "image_embeds": "AAAA"}), "messages"),
    (CHATS, user({"type": "prompt_embeds", "prompt_embeds": "AAAA"}), "messages"),
    (CHATS, user({"type": "\ud800", "image_embeds": "AAAA"}), "messages"),
    (MESSAGES, user({"type": "image", "source": {"type": "url", "url": "https://a/b.png"}}), "messages"),
    (MESSAGES, user({"type": "tool_result", "content": [{"type": "image", "source": {"url": "ftp://a"}}]}), "messages"),
    (MESSAGES, user({"type": "tool_use", "name": "f", "input": {}}), "messages"),
    (MESSAGES, {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template"),
]  # fmt: skip


async def test_what_would_harm_an_engine_is_refused_before_any_is_asked(machine, pair) -> None:
    for path, change, param in REFUSED:
        status, _, answer = await machine.post(path, {**REQUESTS[path], **change})
        assert (status, answer["error"]["param"]) == (400, param), (change, answer)
        assert answer["error"]["type"] == "invalid_request_error" and len(answer["error"]["message"]) > 20
    for engine in pair:
        assert not any(engine.received(path) for path in REQUESTS)
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


@pytest.mark.parametrize("path", REQUESTS)
async def test_what_only_decode_can_refuse_leaves_no_kv_behind(machine, path) -> None:
    pair = await machine.pair(max_model_len=64)
    status, _, answer = await machine.post(path, {**REQUESTS[path], "max_tokens": 1000})
    assert status == 400 and "maximum context length" in answer["error"]["message"]
    await machine.unharmed(*pair)
    assert machine.proxy.services.stats.drains.done == 1
    status, _, answer = await machine.post(path, REQUESTS[path])
    assert (status, text_of(answer)) == (200, RIGHT[path])


ODD = [None, True, False, 0, 1, 2, 3, -1, 10**20, 1.0, 1.5, float("inf"), "1", "5", "", "x", "true"]
ODD += [[], [1], [[]], {}, {"a": 1}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
CHOICES = ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}]
CHOICES += [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "f"}]
SENSIBLE: dict[str, list[Any]] = {
    "model": ["sim-model", "other"],
    "max_tokens": [5, 600, 10_000],
    "max_completion_tokens": [5, 600],
    "min_tokens": [2, 4],
    "n": [2, 3],
    "best_of": [2],
    "stream": [True],
    "stream_options": [{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}],
    "echo": [True],
    "logprobs": [2, 30],
    "top_logprobs": [2],
    "prompt_logprobs": [1],
    "temperature": [0.5, 0],
    "top_p": [0.5],
    "seed": [7],
    "stop": [[" the"], "e"],
    "stop_token_ids": [[256], [300, 301]],
    "stop_sequences": [[" of"]],
    "ignore_eos": [True],
    "use_beam_search": [True],
    "truncate_prompt_tokens": [1, 2],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": SCHEMA}}],
    "structured_outputs": [{"choice": ["yes", "no"]}],
    "tools": [[TOOL], [{"name": "f", "input_schema": {"type": "object"}}]],
    "tool_choice": CHOICES,
    "parallel_tool_calls": [False],
    "chat_template": ["x"],
    "chat_template_kwargs": [{"enable_thinking": False}, {"chat_template": "x"}],
    "add_generation_prompt": [False],
    "continue_final_message": [True],
    "return_token_ids": [True],
    "kv_transfer_params": [{"do_remote_decode": True}],
    "vllm_xargs": [{"kv_transfer_params": "x"}],
    "request_id": ["x"],
    "prompt_embeds": ["AAAA"],
    "suffix": ["x"],
    "system": ["Be brief.", [{"type": "text", "text": "Be brief."}]],
    "messages": [CHAT, [{"role": "assistant", "content": None}], user({"type": "text", "text": "Hello"})["messages"]],
    "prompt": [["one two", "three four"], [300, 301], [[300, 301], [302, 303]]],
}  # fmt: skip
FIELDS = st.sampled_from(sorted(SENSIBLE)).flatmap(
    lambda name: st.tuples(st.just(name), st.sampled_from(SENSIBLE[name]) | st.sampled_from(ODD))
)


def limits_of(path: str, body: dict[str, Any]) -> list[Any]:
    """What older and newer vLLM take for the limit of tokens."""
    if path != CHATS:
        return [body["max_tokens"]]
    newer = body.get("max_completion_tokens")
    return [newer or body["max_tokens"], body["max_tokens"] if newer is None else newer]


@pytest.mark.parametrize("path", REQUESTS)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(fields=st.lists(FIELDS, max_size=6))
async def test_no_body_kills_or_stalls_an_engine(path, machine, fields) -> None:
    engines = machine.engines or await machine.pair(max_model_len=512, keepalive_seconds=60)
    prefill, decode = engines
    raw = json.dumps({**REQUESTS[path], **dict(fields)}).replace("Infinity", "1e400").encode()
    asked = len(decode.received(path))
    status, _, answer = await machine.send(path, raw)
    assert status in (200, 400, 404, 502), (status, answer)
    if len(decode.received(path)) > asked:
        got = prefill.received(path)[-1].json
        assert all(limit == 1 or (limit == 0 and got["echo"]) for limit in limits_of(path, got)), got
    await machine.unharmed(*engines)
    status, _, body = await machine.post(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 4})
    assert (status, text_of(body)) == (200, expected_text(PROMPT, 4))
