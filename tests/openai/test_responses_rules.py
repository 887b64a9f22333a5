"""The rules of /v1/responses: prefill's body, what a pair cannot serve, prefixes, usage, a stream's beginning."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagg_proxy.openai.fields import CHAT, RESPONSES, responses_transfer_kv
from disagg_proxy.openai.prefix_hash import Affinity, AffinityNeeds, affinity
from disagg_proxy.openai.prepare import Prepared, prepare
from disagg_proxy.openai.responses_stream import has_output
from disagg_proxy.openai.usage import CachedTokens, cache_use, output_tokens, repair_usage

BASE = {"model": "m", "input": "Where is it?"}
FUNCTION = {"type": "function", "name": "f", "parameters": {}}


def prepared(**changes: Any) -> Prepared:
    return prepare(RESPONSES, json.dumps({**BASE, **changes}).encode())


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({}, 1), ({"max_output_tokens": None}, 1), ({"max_output_tokens": 50}, 1), ({"max_output_tokens": 1.0}, 1),
        ({"max_output_tokens": "7"}, 1), ({"max_output_tokens": True}, 1), ({"max_output_tokens": 0}, 0),
        ({"max_output_tokens": -3}, -3), ({"max_output_tokens": 1.5}, 1.5), ({"max_output_tokens": [2]}, [2]),
    ],
)  # fmt: skip
def test_prefills_limit(given: dict[str, Any], sent: Any) -> None:
    assert json.loads(prepared(**given).prefill_body)["max_output_tokens"] == sent


def test_prefill_neither_streams_nor_stores_nor_runs_in_the_background() -> None:
    body = {"stream": True, "store": True, "background": False, "tools": [FUNCTION], "tool_choice": "required"}
    found = prepared(**body)
    rest = {"tools": [FUNCTION], "tool_choice": "required", "max_output_tokens": 1}
    assert json.loads(found.prefill_body) == {**BASE, **rest, "stream": False, "store": False}
    assert found.decode_body == json.dumps({**BASE, **body}).encode() and found.streams and found.refusal is None


def test_fields_of_other_routes_say_nothing() -> None:
    found = prepared(min_tokens=9, max_tokens=2, n=3)
    assert found.refusal is None and (found.choices, found.limit) == (1, 0)
    assert json.loads(found.prefill_body)["max_tokens"] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"background": True}, {"background": "true"}, {"previous_response_id": "resp_1"}, {"truncation": "auto"},
        {"truncation": None}, {"tools": [FUNCTION, {"type": "mcp"}]}, {"tools": ["x"]},
        {"input": [{"type": "item_reference", "id": "x"}]}, {"chat_template_kwargs": {"chat_template": "x"}},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://x/y"}]}]},
        {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"file_url": "https://x/y"}]}]},
    ],
)  # fmt: skip
def test_what_a_pair_cannot_serve(changes: dict[str, Any]) -> None:
    refusal = prepared(**changes).refusal
    assert refusal is not None and refusal.status == 501
    assert "/v1/chat/completions" in refusal.message and refusal.message.endswith(".")


@pytest.mark.parametrize(
    "changes",
    [
        {"background": False}, {"background": None}, {"previous_response_id": None}, {"truncation": "disabled"},
        {"tools": [FUNCTION]}, {"tools": None}, {"tools": 3}, {"input": None}, {"input": 3}, {"input": [3, None]},
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "3"}]},
    ],
)  # fmt: skip
def test_what_it_serves_or_leaves_for_prefill_to_refuse(changes: dict[str, Any]) -> None:
    assert prepared(**changes).refusal is None


@pytest.mark.parametrize(
    ("version", "transfers"),
    [
        ("0.33.0", True), ("0.19.0", True), ("0.18.1", False), ("0.9.2", False), ("1.0.0", True),
        ("0.20.1.dev3+gabc", True), ("", False), ("dev", False), (None, False),
    ],
)  # fmt: skip
def test_versions(version: str | None, transfers: bool) -> None:
    assert responses_transfer_kv(version) is transfers


# -- prefixes

LONG = "word " * 200
WANTED = AffinityNeeds(prefix=True, session=True)


def of_responses(**body: Any) -> Affinity:
    return affinity(RESPONSES, {"model": "m", **body}, WANTED)


def of_chat(*messages: tuple[str, str]) -> Affinity:
    found = [{"role": role, "content": content} for role, content in messages]
    return affinity(CHAT, {"model": "m", "messages": found}, WANTED)


@pytest.mark.parametrize("items", [
    LONG, [{"role": "user", "content": LONG}], [{"type": "message", "role": "user", "content": LONG}],
    [{"role": "user", "content": [{"type": "input_text", "text": LONG}]}],
])  # fmt: skip
def test_prefixes_are_those_of_the_same_chat(items: Any) -> None:
    same = of_chat(("system", "Be brief."), ("user", LONG))
    assert of_responses(input=items, instructions="Be brief.").prefix == same.prefix != ()
    assert of_responses(input=items).prefix == of_chat(("user", LONG)).prefix


def test_a_conversation_keeps_its_home_and_its_prefixes() -> None:
    first = of_responses(input=LONG, user="u")
    answer = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
              "content": [{"type": "output_text", "text": LONG, "annotations": []}]}  # fmt: skip
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": LONG}
    items = [{"role": "user", "content": LONG}, answer, call, result]
    later = of_responses(input=items, user="u")
    assert later.prefix[: len(first.prefix)] == first.prefix and len(later.prefix) > len(first.prefix)
    assert (later.home, later.user) == (first.home, first.user) and first.user is not None
    assert of_responses(input=[*items[:3], {**result, "output": "else"}]).prefix != later.prefix
    assert of_responses(input=LONG, tools=[FUNCTION]).home != first.home


@pytest.mark.parametrize("given", [None, 3, [], [3], [None], [{}], [{"content": 3}], {"role": "user"}])
def test_no_input_raises(given: Any) -> None:
    of_responses(input=given, instructions=given)


# -- usage


def answer(cached: int, written: int | None = None, turns: str = "[]") -> bytes:
    """An answer as vLLM writes it; its tools hold what looks like usage."""
    more = "" if written is None else f',"cache_write_tokens":{written}'
    usage = (
        f'"usage":{{"input_tokens":90,"input_tokens_details":{{"cached_tokens":{cached}{more},'
        f'"input_tokens_per_turn":[],"cached_tokens_per_turn":{turns}}},"output_tokens":5,'
        '"output_tokens_details":{"reasoning_tokens":0,"output_tokens_per_turn":[]},"total_tokens":95},"user":null'
    )
    tools = '"tools":[{"default":{"input_tokens_details":{"cached_tokens":3}}}]'
    return f'{{"id":"resp_1","object":"response",{tools},{usage}}}'.encode()


@pytest.mark.parametrize("turns", ["[]", "[{}]"])
@pytest.mark.parametrize("written", [None, 16])
def test_usage(written: int | None, turns: str) -> None:
    use = cache_use(RESPONSES, answer(64, written))
    assert use == CachedTokens(64, written)
    of_decode = answer(89, None if written is None else 0, turns.format(89))
    assert repair_usage(RESPONSES, of_decode, use) == answer(64, written, turns.format(64))
    assert repair_usage(RESPONSES, of_decode, None) == of_decode
    assert output_tokens(of_decode) == 5


# -- the beginning of a stream

PREAMBLE = (
    b'event: response.created\ndata: {"type":"response.created","response":{"instructions":"event: x\\n"}}\n\n'
    b'event: response.in_progress\ndata: {"type":"response.in_progress"}\n\n'
)


@pytest.mark.parametrize("end", range(0, len(PREAMBLE) + 1, 7))
def test_the_preamble_is_no_output_however_much_of_it_is_there(end: int) -> None:
    assert not has_output(PREAMBLE[:end]) and not has_output(PREAMBLE[:end].replace(b"in_progress", b"queued"))


@pytest.mark.parametrize(
    "event",
    [
        b"event: response.output_item.added\n",
        b"event: response.completed\n",
        b"event: error\n",
        b'data: {"error":{}}\n',
    ],
)
def test_anything_else_is(event: bytes) -> None:
    assert has_output(PREAMBLE + event) and has_output(event)
    assert not has_output(PREAMBLE + event[:8])
