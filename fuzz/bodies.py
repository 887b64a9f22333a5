"""Plausible but odd requests for the three generation routes, as hypothesis strategies.

Most fields get values that vLLM takes, so that most requests reach both engines; some get any JSON at all, in other
encodings, with keys given twice. Also a target of its own: :func:`check` gives such a request to
``openai/prepare.py`` and holds what :mod:`fuzz.prepare` says.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from disagg_proxy.openai.fields import CHAT, COMPLETIONS, MESSAGES, ROUTES, Route
from fuzz import prepare

T = TypeVar("T")

MODEL = "sim-model"
MOST_TOKENS = 12


@dataclass(frozen=True)
class Odd:
    """One request: where it goes, and its body as it is sent."""

    route: Route
    raw: bytes


_TEXT = st.sampled_from(["San Francisco is a", "Hi", "a b c d e f g", "東京 🙂", "\ud800", "\0", "", " ", "<|im_end|>"])
_TEXTS = _TEXT | st.text(max_size=12)
_IDS = st.lists(st.integers(0, 151_935), min_size=1, max_size=20)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False) | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=5,
)
_LIMIT = st.integers(1, MOST_TOKENS)
_ODD_LIMIT = st.sampled_from([0, -1, 1.0, 2.0, 1.5, True, False, "3", " 4 ", "5.0", "1e1", "x", None, 2**63, 1e300])
_FLAG = st.booleans()
_ODD_FLAG = st.sampled_from([0, 1, "true", "false", "on", "off", "no", None, "", 2, [], 1.0])
_LOGPROBS = st.sampled_from([0, 1, 2, 5, 20, 21, -1, None])
_URL = st.sampled_from(["data:image/png;base64,AA", "http://127.0.0.1:1/x", " DATA:,", "file:///etc/passwd", ""])
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
_PART = (
    st.fixed_dictionaries({"type": st.just("text"), "text": _TEXTS})
    | st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": _URL})})
    | st.fixed_dictionaries({"type": st.just("tool_use"), "id": st.just("t") | st.just(""), "name": st.just("f")})
    | st.fixed_dictionaries({"type": st.just("tool_result"), "tool_use_id": st.just("t"), "content": _TEXTS})
    | st.fixed_dictionaries({"type": _TEXTS}, optional={"uuid": _TEXTS, "image_embeds": _JSON})
)
_MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "user", "user", "assistant", "system", "tool", "developer", "x"]),
        "content": _TEXTS | _TEXTS | st.lists(_PART, max_size=3) | _JSON,
    },
    optional={"name": _TEXTS, "tool_calls": _JSON, "tool_call_id": _TEXTS},
)
_GOOD_MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": _TEXT}), min_size=1, max_size=3
)

_COMMON: dict[str, st.SearchStrategy[Any]] = {
    "stream": _FLAG | _ODD_FLAG,
    "temperature": st.sampled_from([0, 0.0, 0.7, 1, 2.5, -1, 1e-6]),
    "top_p": st.sampled_from([1, 0.5, 0, 1e-9, 2]),
    "top_k": st.sampled_from([-1, 0, 1, 50]),
    "kv_transfer_params": st.sampled_from([{}, {"do_remote_decode": True}, None, "x"]),
    "chat_template_kwargs": st.sampled_from([{}, {"enable_thinking": False}, {"chat_template": "x"}, None]),
}
_OPENAI: dict[str, st.SearchStrategy[Any]] = {
    **_COMMON,
    "n": st.sampled_from([1, 2, 3, None, 0, "2", 2.0, True, -1]),
    "min_tokens": st.integers(0, MOST_TOKENS) | _ODD_LIMIT,
    "stream_options": st.sampled_from([{}, {"include_usage": True}, {"continuous_usage_stats": True}, None, [], "x"]),
    "stop": st.sampled_from(["the", ["of", "and"], [], "", [""], None, [1]]),
    "stop_token_ids": st.sampled_from([[256], [], None, ["x"]]),
    "ignore_eos": _FLAG | _ODD_FLAG,
    "seed": st.sampled_from([0, 1, -1, 2**63, None]),
    "logit_bias": st.sampled_from([{}, {"1": 1.0}, {"x": "y"}, None]),
    "echo": _FLAG | _ODD_FLAG,
    "prompt_logprobs": _LOGPROBS,
    "truncate_prompt_tokens": st.sampled_from([0, 1, 4, -1, None, "2", True, 1.0]),
    "add_special_tokens": _FLAG,
    "return_token_ids": _FLAG,
    "include_stop_str_in_output": _FLAG,
    "use_beam_search": st.sampled_from([False, None, 0, True, "false"]),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}, {"type": "x"}, {}, None]),
    "structured_outputs": st.sampled_from([{"choice": ["a", "b"]}, {"json": {"type": "object"}}, {}, {"regex": "a"}]),
    "priority": st.integers(-2, 2),
    "cache_salt": _TEXTS,
    "vllm_xargs": st.sampled_from([{}, {"kv_transfer_params": {"x": 1}}, {"a": 1}, None, []]),
    "request_id": _TEXTS,
    "user": _TEXTS,
}
_EXTRA: dict[Route, dict[str, st.SearchStrategy[Any]]] = {
    COMPLETIONS: {
        **_OPENAI,
        "max_tokens": _LIMIT | _ODD_LIMIT,
        "logprobs": _LOGPROBS,
        "suffix": st.sampled_from(["x", None, ""]),
        "best_of": st.sampled_from([1, 2, None]),
        "prompt_embeds": st.sampled_from([None, "AA", []]),
    },
    CHAT: {
        **_OPENAI,
        "max_completion_tokens": _LIMIT | _ODD_LIMIT,
        "logprobs": _FLAG,
        "top_logprobs": _LOGPROBS,
        "tools": st.sampled_from([[_TOOL], [], None, [{}], "x"]),
        "tool_choice": st.sampled_from(
            ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}, {}]
        ),
        "chat_template": st.sampled_from([None, "{{ x }}"]),
        "add_generation_prompt": _FLAG,
        "continue_final_message": _FLAG,
        "documents": st.sampled_from([[{"text": "x"}], [], None]),
        "reasoning_effort": st.sampled_from(["low", "x", None]),
    },
    MESSAGES: {
        **_COMMON,
        "system": _TEXTS | st.lists(_PART, max_size=2),
        "stop_sequences": st.sampled_from([["the"], [], None, [1]]),
        "tools": st.sampled_from([[{"name": "f", "input_schema": {"type": "object"}}], [], None, [{}]]),
        "tool_choice": st.sampled_from(
            [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "f"}, {"type": "none"}]
        ),
        "thinking": st.sampled_from([{"type": "enabled", "budget_tokens": 1024}, None]),
        "metadata": st.sampled_from([{}, {"user_id": "x"}, None]),
    },
}


@st.composite
def requests(draw: st.DrawFn) -> Odd:
    """One request."""
    route = draw(st.sampled_from(ROUTES))
    body: dict[str, Any] = {"model": MODEL, "max_tokens": draw(_LIMIT)}
    if route is COMPLETIONS:
        prompts = _TEXT | _IDS | st.lists(_TEXT, min_size=1, max_size=3) | st.lists(_IDS, min_size=1, max_size=3)
        body["prompt"] = draw(prompts)
    else:
        body["messages"] = draw(_GOOD_MESSAGES)
    extra = _EXTRA[route]
    for name in draw(st.lists(st.sampled_from(sorted(extra)), max_size=4, unique=True)):
        body[name] = draw(extra[name])
    oddity = draw(st.sampled_from([None] * 6 + ["any", "drop", "messages", "prompt"]))
    if oddity == "any":
        body[draw(st.sampled_from([*sorted(extra), "model", "max_tokens", "prompt", "messages", "x"]))] = draw(_JSON)
    elif oddity == "drop":
        del body[draw(st.sampled_from(sorted(body)))]
    elif oddity == "messages":
        body["messages"] = draw(st.lists(_MESSAGE, max_size=3) | _JSON)
    elif oddity == "prompt":
        body["prompt"] = draw(_JSON)
    return Odd(route, draw(written(body)))


def written(body: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """The body as bytes: nearly always plain JSON."""

    def write(how: str) -> bytes:
        if how == "twice":
            text = json.dumps(body)
            return ('{"max_tokens": 1, "stream": true, "n": 2, ' + text[1:]).encode()
        if how == "utf-8":
            return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
        if how == "utf-16":
            return json.dumps(body).encode("utf-16")
        return json.dumps(body, indent=1 if how == "indented" else None).encode()

    return st.sampled_from(["plain"] * 9 + ["utf-8", "utf-16", "twice", "indented"]).map(write)


def drawn(strategy: st.SearchStrategy[T], seed: int, count: int) -> list[T]:
    """``count`` examples at once, for those that cannot be run within hypothesis."""
    found: list[T] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: T) -> None:
        found.append(example)

    collect()
    # One that hypothesis could not finish is missing.
    return (found * 2)[:count]


def inputs(seed: int) -> Iterator[bytes]:
    """For runs that no coverage guides: requests as :func:`fuzz.prepare.check` takes them."""
    for number in itertools.count():
        for odd in drawn(requests(), seed * 1000 + number, 200):
            yield bytes([ROUTES.index(odd.route)]) + odd.raw


@settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests())
def _prepared(odd: Odd) -> None:
    global _label
    _label = prepare.check_body(odd.route, odd.raw)


_label = ""
SEEDS = [bytes(200), bytes(range(256)) * 2, b"\x01\x00" * 200]
WORDS = [b"\0\0\0\0", b"\1", b"\xff\xff", b"\x80"]


def check(data: bytes) -> str:
    """One execution that libFuzzer guides: what hypothesis reads out of ``data``."""
    global _label
    _label = "no request"
    _prepared.hypothesis.fuzz_one_input(data)  # type: ignore[attr-defined]
    return _label
