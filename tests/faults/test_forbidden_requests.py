"""Requests that kill or stall an engine, or come back as garbage: changed on the way, or refused before any engine
hears of them. Rules: docs/request-fields.md."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disagg_proxy.server.asgi import create_app
from disagg_proxy.server.asgi.engine_routes import NOT_SERVED, POOLING
from disagg_sim import expected_text
from tests.simulated import CHAT, PROMPT, REQUESTS, RIGHT, text_of, text_of_events

COMPLETIONS, CHATS, MESSAGES = REQUESTS

LEFT_ON_PREFILL = {
    "min_tokens": (COMPLETIONS, {"max_tokens": 8, "min_tokens": 8}),
    "min_tokens of a chat": (CHATS, {"max_tokens": 8, "min_tokens": 8}),
    "stream_options": (COMPLETIONS, {"stream": True, "stream_options": {"include_usage": True}}),
    "stream_options of a chat": (CHATS, {"stream": True, "stream_options": {"include_usage": True}}),
    "max_tokens": (COMPLETIONS, {"max_tokens": 8}),
    "no max_tokens": (COMPLETIONS, {"max_tokens": 16}),
    "max_completion_tokens": (CHATS, {"max_completion_tokens": 8}),
    "both limits": (CHATS, {"max_tokens": 8, "max_completion_tokens": 8}),
    "max_tokens of messages": (MESSAGES, {"max_tokens": 8}),
}
"""Fields that end prefill, or that it refuses, when they reach it as they are."""


@pytest.mark.parametrize("name", LEFT_ON_PREFILL)
async def test_what_prefill_must_not_get_is_answered_all_the_same(machine, pair, name: str) -> None:
    path, fields = LEFT_ON_PREFILL[name]
    body = {**REQUESTS[path], **fields}
    if name == "no max_tokens":
        del body["max_tokens"]
    if body.get("stream"):
        assert text_of_events(await machine.stream(path, body)) == RIGHT[path]
    else:
        status, _, answer = await machine.post(path, body)
        right = expected_text(PROMPT, 16) if name == "no max_tokens" else RIGHT[path]
        assert (status, text_of(answer)) == (200, right)
    got = pair[0].received(path)[-1].json
    assert got["max_tokens"] == 1 and got.get("max_completion_tokens", 1) == 1
    assert not {"min_tokens", "stream_options"} & got.keys() and not got.get("stream")
    assert pair[1].received(path)[-1].json == body
    await machine.unharmed(*pair)


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
async def test_n_is_the_same_on_both_legs(machine, pair, path: str) -> None:
    """n = 1 on prefill and 2 on decode stalls decode for ever."""
    status, _, answer = await machine.post(path, {**REQUESTS[path], "n": 2})
    assert status == 200 and len(answer["choices"]) == 2
    assert [engine.received(path)[0].json["n"] for engine in pair] == [2, 2]
    await machine.unharmed(*pair)


OTHER_IDS = ["mine", "", "___prefill_addr_10.0.0.1:1___decode_addr_10.0.0.1:2_00", "cmpl-1", "a" * 300]


@pytest.mark.settings(enable_profiling=True)
@pytest.mark.parametrize("own", OTHER_IDS, ids=["plain", "empty", "forged", "engine's", "long"])
async def test_no_request_without_the_pairs_addresses_makes_an_engine_generate(machine, pair, own: str) -> None:
    """Whatever route a client takes: one such request ends the engine."""
    prefill, decode = pair
    app = create_app(machine.proxy.services.config, machine.proxy.services)
    paths = {re.sub(r"<[^>]+>", "sim-model", rule.rule) for rule in app.url_map.iter_rules()}
    paths |= {"/invocations", "/inference/v1/generate", "/generate", "/v1/completions/render", "/v1/responses"}
    assert paths > set(REQUESTS)
    bodies = [*REQUESTS.values(), {**REQUESTS[COMPLETIONS], "request_id": own, "input": "x"}]
    for path in sorted(paths):
        for body in bodies:
            for method in ("GET", "POST", "PUT"):
                async with machine.http.request(
                    method, machine.proxy.url + path, json=body, headers={"X-Request-Id": own, "x-request-id": own}
                ) as answer:
                    # The page's events have no end.
                    if answer.content_type != "text/event-stream":
                        await answer.read()
    harmless = {"/health", "/v1/models", "/version", "/tokenize", "/detokenize", "/v1/messages/count_tokens"}
    # The load of engines is read while the page is open.
    harmless |= {"/start_profile", "/stop_profile", "/metrics", "/metrics/"}
    right = f"___prefill_addr_{prefill.kv_address}___decode_addr_{decode.kv_address}_[0-9a-f]{{32}}"
    generated = [r for engine in pair for r in engine.requests if r.path not in harmless]
    assert {request.path for request in generated} == set(REQUESTS)
    for request in generated:
        assert [bool(re.fullmatch(right, id)) for id in request.headers.getall("X-Request-Id")] == [True]
    await machine.unharmed(*pair)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/resp_1", "/v1/responses/resp_1/cancel"])
async def test_responses_are_refused(machine, pair, path: str) -> None:
    """Their engine id comes from the body, and ends prefill's engine."""
    for request_id in ("x", "___prefill_addr_10.0.0.1:1___decode_addr_10.0.0.1:2_00"):
        status, _, body = await machine.post(path, {"model": "sim-model", "input": "x", "request_id": request_id})
        assert (status, body["error"]["code"]) == (501, "not_implemented")
        assert "/v1/chat/completions" in body["error"]["message"]
    assert not any(request.path == path for engine in pair for request in engine.requests)
    await machine.unharmed(*pair)


@pytest.mark.parametrize("path", sorted({*NOT_SERVED, *POOLING}))
async def test_what_was_not_tried_on_real_engines_reaches_none(machine, pair, path: str) -> None:
    status, _, body = await machine.post(path, {"model": "sim-model", "input": "x", "prompt": "x"})
    assert (status, body["error"]["code"]) == (501, "not_implemented") and len(body["error"]["message"]) > 40
    assert not any(request.path == path for engine in pair for request in engine.requests)


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
