"""Long strings that do not pass the JSON reader."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.errors import ProxyError
from disagg_proxy.openai.fields import CHAT, COMPLETIONS, Route
from disagg_proxy.openai.lazy_json import LONG, read
from disagg_proxy.openai.prefix_hash import AffinityNeeds
from disagg_proxy.openai.prepare import Prepared, prepare

LONG_TEXT = "Once upon a time, " * (LONG // 10)
SLOWLY = AffinityNeeds(prefix=True)
"""Whoever wants the prompt's beginning has the text read."""


def outcome(route: Route, raw: bytes, wanted: AffinityNeeds | None) -> Any:
    """What becomes of a request, without how its text is escaped."""
    try:
        found: Prepared = prepare(route, raw, wanted)
    except ProxyError as error:
        return error.status, error.message
    decode = found.decode_body if found.decode_body == raw else json.loads(found.decode_body)
    rest = (found.model, found.choices, found.prefill_answers, found.limit, found.streams)
    return json.loads(found.prefill_body), decode, json.loads(found.kv_release_body), str(found.refusal), rest


BODIES: list[tuple[Route, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": LONG_TEXT}),
    (COMPLETIONS, {"prompt": LONG_TEXT, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}),
    (COMPLETIONS, {"model": "m", "prompt": LONG_TEXT + '"quoted" \\ and\n中文 😀', "n": 3}),
    (COMPLETIONS, {"prompt": [LONG_TEXT, "b"], "max_tokens": 1}),
    (COMPLETIONS, {"prompt": LONG_TEXT, "echo": True, "logprobs": 1, "max_tokens": 1}),
    (COMPLETIONS, {"prompt": LONG_TEXT, "kv_transfer_params": {"a": 1}}),
    (COMPLETIONS, {"prompt": LONG_TEXT, "max_tokens": None}),
    (COMPLETIONS, {"prompt": LONG_TEXT, "use_beam_search": True}),
    (COMPLETIONS, {"suffix": LONG_TEXT, "prompt": "x"}),
    (COMPLETIONS, {LONG_TEXT: 1, "prompt": "x"}),
    (COMPLETIONS, {"vllm_xargs": {"prompt": LONG_TEXT}, "prompt": "x"}),
    (CHAT, {"messages": [{"role": "user", "content": LONG_TEXT}, {"role": "user", "content": LONG_TEXT + "b"}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG_TEXT}]}], "max_tokens": 3}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": LONG_TEXT}}]}]}),
    (CHAT, {"messages": [{"role": "user", "content": LONG_TEXT}], "tool_choice": "required", "min_tokens": 4}),
]  # fmt: skip


@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "utf-8"])
@pytest.mark.parametrize("space", [(",", ":"), (" , ", " : ")], ids=["dense", "wide"])
@pytest.mark.parametrize(("route", "body"), BODIES)
def test_a_request_means_the_same_read_either_way(
    route: Route, body: dict[str, Any], ascii_only: bool, space: tuple[str, str]
) -> None:
    raw = json.dumps(body, ensure_ascii=ascii_only, separators=space).encode()
    assert outcome(route, raw, None) == outcome(route, raw, SLOWLY)
    if len(body.get("prompt", "")) > LONG and body.get("max_tokens", 0) is not None:
        sizes = [prepare(route, raw, wanted).prompt for wanted in (None, SLOWLY)]
        # Escapes count as they are written.
        assert sizes[0][0] == sizes[1][0] and sizes[1][1] <= sizes[0][1] <= 3 * sizes[1][1] + 64


def test_the_text_is_not_read() -> None:
    body = read(json.dumps({"prompt": LONG_TEXT, "suffix": LONG_TEXT, "max_tokens": 5}).encode())
    assert isinstance(body["prompt"], msgspec.Raw) and (body["suffix"], body["max_tokens"]) == (LONG_TEXT, 5)
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG_TEXT}, {"type": "x"}]}]}
    (message,) = read(json.dumps(chat).encode())["messages"]
    assert message["role"] == "user" and message["content"][1] == {"type": "x"}
    assert isinstance(message["content"][0]["text"], msgspec.Raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"{" + b" " * 5000,
        b'{"prompt": "' + b"x" * 5000,
        b'{"prompt": "' + b"x" * 5000 + b"\\",
        b'{"prompt": "' + b"x" * 5000 + b'\\"}',
        b'{"prompt": ' + b'"x",' * 5000 + b"}",
        b'["' + b"x" * 5000 + b'"]',
        b'"' + b"x" * 5000 + b'"',
        b'{"prompt": "' + b"x" * 5000 + b'", "n": NaN}',
        b'{"prompt": "' + b"x" * 5000 + b'", "n": 1e999}',
        b'{"messages": [1, "' + b"x" * 5000 + b'"]}',
        b'{"messages": [{"content": ' + b"[" * 5000 + b"]" * 5000 + b"}]}",
        b'{"prompt": "' + b"x" * 5000 + b'", "user": "\\ud800", "request_id": "a"}',
        '{"prompt": "x"}'.encode("utf-16") + b" \0" * 5000,
    ],
)
def test_what_cannot_be_read_so_is_read_whole(raw: bytes) -> None:
    assert outcome(COMPLETIONS, raw, None) == outcome(COMPLETIONS, raw, SLOWLY)


@pytest.mark.parametrize("slashes", range(6))
def test_backslashes_before_the_closing_quote(slashes: int) -> None:
    raw = json.dumps({"prompt": "x" * 3000 + "\\" * slashes, "n": 1}).encode()
    assert outcome(COMPLETIONS, raw, None) == outcome(COMPLETIONS, raw, SLOWLY)


def test_two_prompts_in_one_body_are_what_json_makes_of_them() -> None:
    for raw in (
        b'{"prompt": "%b", "prompt": "short", "max_tokens": 2}' % LONG_TEXT.encode(),
        b'{"prompt": "short", "prompt": "%b", "max_tokens": 2}' % LONG_TEXT.encode(),
        b'{"prompt": "%b", "prompt": "%b!", "max_tokens": 2}' % (LONG_TEXT.encode(), LONG_TEXT.encode()),
    ):
        assert outcome(COMPLETIONS, raw, None) == outcome(COMPLETIONS, raw, SLOWLY)


KEYS = st.sampled_from(["prompt", "content", "text", "n"])
TEXTS = st.text(max_size=9) | st.sampled_from([LONG_TEXT, LONG_TEXT + '"\\'])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
    max_leaves=8,
)


@given(VALUES, st.sampled_from([COMPLETIONS, CHAT]), st.sampled_from(["prompt", "messages"]))
def test_any_json_means_the_same_read_either_way(value: Any, route: Route, name: str) -> None:
    raw = json.dumps({name: value, "max_tokens": 4}).encode()
    assert outcome(route, raw, None) == outcome(route, raw, SLOWLY)
