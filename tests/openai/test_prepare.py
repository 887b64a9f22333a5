"""The bodies of prefill, decode and drain, field by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.errors import BadRequest, ClientError
from disagg_proxy.openai.fields import CHAT, COMPLETIONS, MESSAGES, ROUTES, Route, forces_tool
from disagg_proxy.openai.prepare import encode, parse_object, prepare

TOOL = {"type": "function", "function": {"name": "f"}}


def on_prefill(route: Route, body: dict[str, Any]) -> dict[str, Any]:
    return json.loads(prepare(route, json.dumps(body).encode()).prefill_body)


def on_drain(route: Route, body: dict[str, Any]) -> dict[str, Any]:
    return json.loads(prepare(route, json.dumps(body).encode()).kv_release_body)


# (max_completion_tokens, max_tokens) of the client and of prefill; None stands for an absent field.
LIMITS = [
    ((None, None), (None, 1)),
    ((None, 100), (None, 1)),
    ((100, None), (1, 1)),
    ((100, 100), (1, 1)),
    ((0, 100), (0, 1)),
    ((100, 0), (1, 0)),
    ((-3, 100), (-3, 1)),
    ((1, 1), (1, 1)),
    (("5", "1e3"), (1, 1)),
    ((True, 2.0), (1, 1)),
    ((False, 1.5), (False, 1.5)),
    (([7], {"a": 1}), ([7], {"a": 1})),
    ((1.5, 10**30), (1.5, 1)),
]


@pytest.mark.parametrize(("given_limits", "expected"), LIMITS)
def test_both_limits_of_chat(given_limits, expected) -> None:
    names = ("max_completion_tokens", "max_tokens")
    body = {name: value for name, value in zip(names, given_limits, strict=True) if value is not None}
    got = on_prefill(CHAT, body)
    assert tuple(got.get(name) for name in names) == expected
    assert [type(got.get(name)) for name in names] == [type(value) for value in expected]


def test_limits_that_are_null() -> None:
    got = on_prefill(CHAT, {"max_tokens": None, "max_completion_tokens": None})
    assert (got["max_tokens"], got["max_completion_tokens"]) == (1, None)
    # Required on this route, so prefill shall refuse its absence.
    assert "max_tokens" not in on_prefill(MESSAGES, {})
    assert on_prefill(MESSAGES, {"max_tokens": None})["max_tokens"] is None


@pytest.mark.parametrize("body", [{}, {"echo": True}, {"kv_transfer_params": {"a": 1}}, {"prompt": "long " * 999}])
def test_a_null_limit_of_completions_is_left_out_on_both_legs(body: dict[str, Any]) -> None:
    """vLLM up to 0.23 fails on the null after generating; every version has the same default for an absent limit."""
    body = {"model": "m", "prompt": "x", **body}
    given, absent = (prepare(COMPLETIONS, json.dumps({**body, **more}).encode()) for more in ({"max_tokens": None}, {}))
    assert json.loads(given.prefill_body) == json.loads(absent.prefill_body)
    assert "max_tokens" not in json.loads(given.decode_body)
    assert json.loads(given.decode_body) == json.loads(absent.decode_body)
    raw = json.dumps({**body, "max_tokens": None}).encode()
    assert json.loads(prepare(CHAT, raw).decode_body)["max_tokens"] is None


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("number", [b"1e400", b"-1e999", b"9" * 400 + b".0"])
def test_a_number_that_reads_as_infinity_is_refused(route, number) -> None:
    with pytest.raises(BadRequest, match="beyond the range"):
        prepare(route, b'{"max_tokens":1,"temperature":' + number + b"}")


def test_a_limit_that_completions_do_not_have_is_left_alone() -> None:
    assert on_prefill(COMPLETIONS, {"max_completion_tokens": 9}) == {
        "max_completion_tokens": 9,
        "max_tokens": 1,
        "stream": False,
    }


@pytest.mark.parametrize(
    ("value", "kept"),
    [(0, True), (1, True), (-4, True), (2, False), ("1", False), (True, False), (None, False), (1.0, False)],
)
def test_min_tokens(value, kept) -> None:
    assert ("min_tokens" in on_prefill(COMPLETIONS, {"min_tokens": value, "max_tokens": 9})) is kept


BUDGET = {"type": "enabled", "budget_tokens": 1024}


@pytest.mark.parametrize(
    ("route", "thinking", "limit", "kept"),
    [
        (MESSAGES, BUDGET, 2000, False),
        (MESSAGES, {**BUDGET, "display": "omitted"}, 1025, False),
        (MESSAGES, {"type": "enabled", "budget_tokens": "1024"}, "2000", False),
        # Decode refuses these, so prefill should too.
        (MESSAGES, BUDGET, 1024, True),
        (MESSAGES, BUDGET, None, True),
        (MESSAGES, {"type": "enabled"}, 2000, True),
        (MESSAGES, {"type": "enabled", "budget_tokens": 1.5}, 2000, True),
        # Part of the prompt, or no limit at all.
        (MESSAGES, {"type": "disabled"}, 2000, True),
        (MESSAGES, {"type": "adaptive"}, 2000, True),
        (MESSAGES, "enabled", 2000, True),
        (MESSAGES, None, 2000, True),
        (CHAT, BUDGET, 2000, True),
    ],
)
def test_a_thinking_budget_that_exceeds_one_token_is_decodes_alone(route, thinking, limit, kept) -> None:
    body = {"thinking": thinking, "max_tokens": limit}
    assert ("thinking" in on_prefill(route, body)) is kept
    assert "thinking" in json.loads(prepare(route, json.dumps(body).encode()).decode_body)


@pytest.mark.parametrize("stream", [True, 1, "true", "on", [1]])
def test_any_stream_is_taken_off_prefill_with_its_options(stream) -> None:
    got = on_prefill(CHAT, {"stream": stream, "stream_options": {"include_usage": True}})
    assert got["stream"] is False and "stream_options" not in got


@pytest.mark.parametrize("stream", [False, None, 0, ""])
def test_options_without_a_stream_stay_for_prefill_to_refuse(stream) -> None:
    got = on_prefill(COMPLETIONS, {"stream": stream, "stream_options": {"include_usage": True}})
    assert got["stream"] is False and got["stream_options"] == {"include_usage": True}


FORCED = [
    (CHAT, "required", True),
    (CHAT, TOOL, True),
    (CHAT, "auto", False),
    (CHAT, "none", False),
    (CHAT, None, False),
    (MESSAGES, {"type": "any"}, True),
    (MESSAGES, {"type": "tool", "name": "f"}, True),
    (MESSAGES, {"type": "auto"}, False),
    (MESSAGES, {"type": "none"}, False),
    (MESSAGES, "required", False),
    (COMPLETIONS, "required", False),
]


@pytest.mark.parametrize(("route", "choice", "forced"), FORCED)
def test_prefill_streams_a_forced_tool_call_only(route, choice, forced) -> None:
    body = {"tool_choice": choice, "max_tokens": 5}
    got = on_prefill(route, body)
    assert forces_tool(route, body) is got["stream"] is forced
    assert got["tool_choice"] == choice
    assert got.get("stream_options") == ({"include_usage": True} if forced and route is CHAT else None)


UNTOUCHED = {
    "model": "m",
    "prompt": ["a", "b"],
    "messages": [{"role": "user", "content": "x"}],
    "n": 3,
    "best_of": 2,
    "use_beam_search": False,
    "echo": True,
    "stop": ["a"],
    "temperature": 0.5,
    "logit_bias": {"5": 1},
    "response_format": {"type": "json_object"},
    "structured_outputs": {"choice": ["a"]},
    "guided_json": {},
    "tools": [TOOL],
    "truncate_prompt_tokens": 5,
    "chat_template_kwargs": {"enable_thinking": True},
    "cache_salt": "s",
    "priority": 3,
    "user": "u",
    "vllm_xargs": {"a": 1},
    "made_up": {"deep": [None, 1.5]},
}


@pytest.mark.parametrize("route", [COMPLETIONS, MESSAGES])
def test_all_else_is_untouched(route) -> None:
    body = {**UNTOUCHED, "max_tokens": 7}
    assert on_prefill(route, body) == {**body, "max_tokens": 1, "stream": False}


@pytest.mark.parametrize("route", ROUTES)
def test_steering_is_stripped_from_every_body(route) -> None:
    body = {
        "max_tokens": 3,
        "kv_transfer_params": None,
        "ec_transfer_params": {"a": 1},
        "request_id": "x",
        "vllm_xargs": {"kv_transfer_params": "x", "request_id": "x", "kept": 1},
    }
    prepared = prepare(route, json.dumps(body).encode())
    assert json.loads(prepared.decode_body) == {"max_tokens": 3, "vllm_xargs": {"kept": 1}}
    for raw in (prepared.prefill_body, prepared.kv_release_body):
        assert b"kv_transfer_params" not in raw and b"ec_transfer_params" not in raw and b"request_id" not in raw


def test_stripping_looks_at_names_not_at_text() -> None:
    raw = b'{ "prompt": "kv_transfer_params request_id", "max_tokens": 3 }'
    assert prepare(COMPLETIONS, raw).decode_body is raw


def test_a_drain_decodes_one_token_of_the_same_request() -> None:
    body = {**UNTOUCHED, "max_tokens": 0, "logprobs": 2, "top_logprobs": 2, "prompt_logprobs": 1, "echo": True}
    got = on_drain(COMPLETIONS, body)
    assert not {"echo", "logprobs", "top_logprobs", "prompt_logprobs"} & got.keys()
    assert (got["max_tokens"], got["stream"], got["n"], got["prompt"]) == (1, False, 3, ["a", "b"])


def test_a_drain_streams_where_prefill_did() -> None:
    got = on_drain(CHAT, {"tool_choice": "required", "max_tokens": 9, "max_completion_tokens": 9, "min_tokens": 3})
    assert (got["stream"], got["max_tokens"], got["max_completion_tokens"]) == (True, 1, 1)
    assert "min_tokens" not in got


@pytest.mark.parametrize(
    ("n", "choices"),
    [(3, 3), (None, 1), ("2", 2), (" 2.0 ", 2), (2.0, 2), (True, 1), (0, 1), (-5, 1), ("1e3", 1), ([7], 1), (2.5, 1)],
)
def test_the_number_of_choices_is_what_vllm_reads(n, choices) -> None:
    assert prepare(CHAT, json.dumps({"n": n}).encode()).choices == choices


@pytest.mark.parametrize(("model", "asked"), [("m", "m"), ("", None), (None, None)])
def test_the_model(model, asked) -> None:
    assert prepare(CHAT, json.dumps({"model": model}).encode()).model == asked


@pytest.mark.parametrize("model", [5, True, [], {}, 1.5])
def test_a_model_that_is_no_text(model) -> None:
    with pytest.raises(BadRequest, match=r"must be a string, not an? "):
        prepare(CHAT, json.dumps({"model": model}).encode())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\n\t",
        b"{",
        b"[]",
        b"1",
        b"null",
        b'"x"',
        b"true",
        b'{"a":NaN}',
        b'{"a":[Infinity]}',
        b"\xff",
        b"[" * 200_000,
    ],
)
def test_no_json_object(raw) -> None:
    with pytest.raises(BadRequest):
        parse_object(raw)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_every_encoding_of_json(encoding) -> None:
    assert parse_object('{"prompt":"东京 🙂"}'.encode(encoding)) == {"prompt": "东京 🙂"}


def test_the_last_of_two_equal_keys_counts_and_lone_surrogates_pass() -> None:
    body = parse_object(rb'{"prompt":"a","prompt":"\ud800"}')
    assert body == {"prompt": "\ud800"} and parse_object(encode(body)) == body


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from("max_tokens max_completion_tokens min_tokens stream stream_options n tool_choice echo".split())


@pytest.mark.parametrize("route", ROUTES)
@given(body=st.dictionaries(NAMES | st.text(max_size=4), JSON, max_size=6))
def test_any_object_is_either_refused_or_limited_to_one_token(route, body) -> None:
    raw = json.dumps(body).encode()
    try:
        prepared = prepare(route, raw)
    except ClientError:
        return
    if route is not COMPLETIONS or body.get("max_tokens", 0) is not None:
        assert prepared.decode_body == raw
    got = json.loads(prepared.prefill_body)
    for name in ("max_tokens", "max_completion_tokens") if route is CHAT else ("max_tokens",):
        limit = got.get(name)
        assert not (isinstance(limit, int) and limit > 1) and not isinstance(limit, str)
        assert not (isinstance(limit, float) and limit >= 1 and limit.is_integer())
    if route is not MESSAGES:
        assert got["max_tokens"] is not None
    assert got["stream"] is forces_tool(route, body)
