"""What is refused with 400 although vLLM would take it, and the neighbours that are not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagg_proxy.errors import ClientError
from disagg_proxy.openai.fields import CHAT, COMPLETIONS, MESSAGES, ROUTES, Route
from disagg_proxy.openai.prepare import Prepared, prepare


def ask(route: Route, body: dict[str, Any]) -> Prepared:
    prepared = prepare(route, json.dumps(body).encode())
    if prepared.refusal is not None:
        # What a pair that hands KV over by request ids does with it; one engine alone serves it.
        raise prepared.refusal
    return prepared


def refused(route: Route, body: dict[str, Any], param: str | None) -> None:
    with pytest.raises(ClientError) as error:
        ask(route, body)
    assert (error.value.status, error.value.param) == (400, param)


def content(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}], "max_tokens": 5}


@pytest.mark.parametrize("value", [True, 1, "true", "on", "false", [], {}])
@pytest.mark.parametrize("route", ROUTES)
def test_beam_search_in_any_spelling(route, value) -> None:
    refused(route, {"use_beam_search": value}, "use_beam_search")


@pytest.mark.parametrize("value", [False, None, 0])
def test_no_beam_search(value) -> None:
    ask(COMPLETIONS, {"use_beam_search": value})


@pytest.mark.parametrize(("value", "right"), [("AAAA", False), (["AAAA"], False), ("", False), (None, True)])
def test_prompt_embeds(value, right) -> None:
    body = {"prompt_embeds": value}
    ask(COMPLETIONS, body) if right else refused(COMPLETIONS, body, "prompt_embeds")


@pytest.mark.parametrize(
    ("value", "right"),
    [
        *((value, True) for value in (0, 100, None)),
        *((value, False) for value in (-1, "-1", "5", True, 1.0, -5.0, [])),
    ],
)
def test_truncation_must_not_depend_on_the_limit(value, right) -> None:
    for route in (COMPLETIONS, CHAT):
        body = {"truncate_prompt_tokens": value}
        ask(route, body) if right else refused(route, body, "truncate_prompt_tokens")


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ({"chat_template": "{{ 1 }}"}, False),
        ({"chat_template": ""}, False),
        ({"chat_template": None}, True),
        ({"chat_template_kwargs": {"chat_template": None}}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, True),
        ({"chat_template_kwargs": ["chat_template"]}, True),
        ({"chat_template_kwargs": None}, True),
    ],
)
def test_a_template_of_the_requests_own(body, right) -> None:
    for route in (CHAT, MESSAGES):
        ask(route, body) if right else refused(route, body, "chat_template")


@pytest.mark.parametrize(
    ("route", "body", "right"),
    [
        (COMPLETIONS, {"min_tokens": 9, "max_tokens": 8}, False),
        (COMPLETIONS, {"min_tokens": 8, "max_tokens": 8}, True),
        (COMPLETIONS, {"min_tokens": 9, "max_tokens": 10, "max_completion_tokens": 3}, True),
        (COMPLETIONS, {"min_tokens": 9, "max_tokens": "8"}, True),
        (CHAT, {"min_tokens": 9, "max_tokens": 10, "max_completion_tokens": 3}, False),
        (CHAT, {"min_tokens": 9}, True),
    ],
)
def test_min_tokens_over_the_limit_is_known_before_any_kv_exists(route, body, right) -> None:
    ask(route, body) if right else refused(route, body, "min_tokens")


MEDIA = [
    {"type": "image_url", "image_url": {"url": "http://a/b.png"}},
    {"type": "image_url", "image_url": {"url": " HTTPS://a/b.png"}},
    {"type": "image_url", "image_url": "file:///a.png"},
    {"image_url": "/etc/passwd"},
    {"type": "video_url", "video_url": {"url": "ftp://a"}},
    {"type": "audio_url", "audio_url": {"url": ""}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}, "uuid": "u"},
    {"type": "image_embeds", "image_embeds": {}},
    {"type": "audio_embeds"},
    {"type": "prompt_embeds", "data": "x"},
    {"image_embeds": None},
    {"type": "image", "source": {"type": "url", "url": "https://a"}},
    {"type": "tool_result", "content": [{"type": "image", "source": {"url": "http://a"}}]},
]


@pytest.mark.parametrize("part", MEDIA)
def test_media_that_each_engine_would_fetch_for_itself(part) -> None:
    for route in (CHAT, MESSAGES):
        refused(route, content(part), "messages")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "see https://a/b.png"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}, "uuid": None},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
        {"type": "tool_result", "content": "https://a"},
        {"type": ["odd"], "image_url": 5, "source": [1]},
        "text",
        None,
    ],
)
def test_media_that_are_the_same_on_both_legs(part) -> None:
    for route in (CHAT, MESSAGES):
        ask(route, content(part))


@pytest.mark.parametrize(
    "messages", [None, 5, "x", {}, [None], [5], [[]], [{"content": None}], [{"content": {"a": 1}}]]
)
def test_messages_of_an_odd_shape_are_for_prefill_to_refuse(messages) -> None:
    for route in ROUTES:
        ask(route, {"messages": messages})


@pytest.mark.parametrize(("number", "right"), [("t1", True), ("", False), (None, False)])
def test_a_tool_call_without_its_id_is_refused_where_vllm_invents_one(number, right) -> None:
    body = content({"type": "tool_use", "name": "f", "input": {}, "id": number}, role="assistant")
    ask(MESSAGES, body) if right else refused(MESSAGES, body, "messages")
    ask(CHAT, body)


LOGPROBS = [
    (COMPLETIONS, {"prompt_logprobs": 0}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": -1}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": False}, "prompt_logprobs"),
    (COMPLETIONS, {"echo": True, "logprobs": 0}, "echo"),
    (COMPLETIONS, {"echo": "yes", "logprobs": 0}, "echo"),
    (CHAT, {"prompt_logprobs": 1}, "prompt_logprobs"),
    (CHAT, {"echo": True}, "echo"),
    (CHAT, {"echo": True, "top_logprobs": 0}, "echo"),
]


@pytest.mark.parametrize(("route", "body", "param"), LOGPROBS)
def test_logprobs_of_the_prompt_only_where_prefill_can_answer(route, body, param) -> None:
    refused(route, body, param)
    for more in (
        {"max_tokens": 2},
        {"max_tokens": "1"},
        {"max_tokens": 1.0},
        {"max_tokens": True},
        {"max_tokens": 1, "stream": True},
    ):
        refused(route, {**body, **more}, param)
    for limit in (0, 1):
        assert ask(route, {**body, "max_tokens": limit}).prefill_answers


def test_logprobs_of_the_prompt_with_chats_two_limits() -> None:
    assert ask(CHAT, {"prompt_logprobs": 1, "max_completion_tokens": 1}).prefill_answers
    assert ask(CHAT, {"prompt_logprobs": 1, "max_completion_tokens": 1, "max_tokens": None}).prefill_answers
    refused(CHAT, {"prompt_logprobs": 1, "max_completion_tokens": 1, "max_tokens": 2}, "prompt_logprobs")
    # Completions have only one, and its default is 16.
    refused(COMPLETIONS, {"prompt_logprobs": 1, "max_completion_tokens": 1}, "prompt_logprobs")


def test_logprobs_of_the_prompt_with_a_forced_tool_for_which_prefill_would_stream() -> None:
    refused(CHAT, {"prompt_logprobs": 1, "max_tokens": 1, "tool_choice": "required"}, "prompt_logprobs")


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (COMPLETIONS, {"prompt_logprobs": None}),
        (COMPLETIONS, {"echo": True}),
        (COMPLETIONS, {"echo": True, "logprobs": None}),
        (COMPLETIONS, {"echo": False, "logprobs": 1}),
        (COMPLETIONS, {"logprobs": 1}),
        (CHAT, {"logprobs": True, "top_logprobs": 2}),
        (CHAT, {"echo": True, "top_logprobs": None}),
        (MESSAGES, {"echo": True}),
    ],
)
def test_requests_without_logprobs_of_the_prompt(route, body) -> None:
    assert not ask(route, body).prefill_answers
