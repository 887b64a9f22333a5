"""What NixlConnector is told and what is taken from its answers: nothing that would end a decode engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.connectors.nixl import for_decode, for_prefill, transfer_params
from disagg_proxy.connectors.prefill_first import fits as fits_nixl
from disagg_proxy.openai.fields import CHAT, COMPLETIONS
from disagg_proxy.openai.prepare import prepare

WHOLE: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3]],
    "remote_engine_id": "e",
    "remote_request_id": "cmpl-1",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
    "something_new": {"of": "a later version"},
}
"""As vLLM 0.32 answers."""


def answer(params: Any) -> bytes:
    return json.dumps({"id": "x", "choices": [], "kv_transfer_params": params}).encode()


@pytest.mark.parametrize("blocks", [[[1, 2, 3]], [[], [0]], [4, 5], [0]])
def test_whole_params_go_to_decode_as_they_are(blocks: list[Any]) -> None:
    params = {**WHOLE, "remote_block_ids": blocks}
    made = for_decode(b'{"prompt": "x"}', answer(params))
    assert json.loads(made) == {"kv_transfer_params": params, "prompt": "x"}


@pytest.mark.parametrize("changes", [
    *({name: None} for name in WHOLE if name not in ("do_remote_decode", "tp_size", "something_new")),
    {"remote_block_ids": []}, {"remote_block_ids": [[]]}, {"remote_block_ids": [[], []]}, {"remote_block_ids": "1"},
    {"remote_block_ids": [["1"]]}, {"remote_block_ids": [None]}, {"do_remote_prefill": False}, {"remote_port": "5600"},
    {"do_remote_prefill": 1},
])  # fmt: skip
def test_params_that_are_not_whole_never_reach_decode(changes: dict[str, Any]) -> None:
    body = b'{"prompt": "x"}'
    assert for_decode(body, answer({**WHOLE, **changes})) is body
    for name in changes:
        missing = {key: value for key, value in WHOLE.items() if key != name}
        assert for_decode(body, answer(missing)) is body


@pytest.mark.parametrize("raw", [
    b"", b"[]", b"null", b"{}", b'{"kv_transfer_params": []}', b'{"kv_transfer_params": "x"}', b"\xff",
    b"[" * 9999, b'data: {"choices": []}\n\n', answer(None), answer({}),
])  # fmt: skip
def test_answers_without_params(raw: bytes) -> None:
    body = b"{}"
    assert for_decode(body, raw) is body


@given(st.dictionaries(st.sampled_from(list(WHOLE)), st.none() | st.booleans() | st.text() | st.lists(st.integers())))
def test_what_passes_has_what_vllm_reads(changes: dict[str, Any]) -> None:
    params = transfer_params(answer({**WHOLE, **changes}))
    if params is not None:
        assert params["do_remote_prefill"] is True and any(params["remote_block_ids"] or [0])
        assert all(params[name] is not None for name in WHOLE if name.startswith("remote_"))


def test_prefill_is_told_to_keep_its_kv() -> None:
    made = json.loads(for_prefill(b'{"prompt":"x","max_tokens":1,"stream":false}'))
    params = made.pop("kv_transfer_params")
    assert made == {"prompt": "x", "max_tokens": 1, "stream": False}
    assert params["do_remote_decode"] is True and params["do_remote_prefill"] is False


def test_prefill_never_streams() -> None:
    """Its answer to a forced tool call is streamed elsewhere, but events carry no params."""
    body = {"messages": [], "tools": [{}], "tool_choice": "required", "stream": True}
    prepared = prepare(CHAT, json.dumps(body).encode())
    assert json.loads(prepared.prefill_body)["stream"] is True
    made = json.loads(for_prefill(prepared.prefill_body))
    assert made["stream"] is False and "stream_options" not in made and made["tool_choice"] == "required"


@pytest.mark.parametrize(("fields", "fits"), [
    ({"prompt": "x"}, True), ({"prompt": ["x"]}, True), ({"prompt": [1, 2]}, True), ({"prompt": [[1, 2]]}, True),
    ({"prompt": ["x", "y"]}, False), ({"prompt": [[1], [2]]}, False), ({"prompt": "x", "n": 2}, False),
    ({"prompt": "x", "n": "2"}, False), ({"prompt": []}, True), ({}, True), ({"prompt": "x", "n": None}, True),
])  # fmt: skip
def test_only_one_engine_request_can_be_handed_over(fields: dict[str, Any], fits: bool) -> None:
    assert fits_nixl(prepare(COMPLETIONS, json.dumps(fields).encode())) is fits
