"""Engines with NixlConnector, sent both legs as the proxy does. Their failures: tests/e2e/test_nixl.py."""

from __future__ import annotations

from typing import Any

import pytest

from disagg_sim import expected_text

from .pair import COMPLETIONS, Pair, running

PROMPT = " ".join(f"word{n}" for n in range(40))
BODY = {"prompt": PROMPT, "max_tokens": 8}
FOR_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


async def answered(pair: Pair, **fields: Any) -> Any:
    """The choice of decode's answer, whose prompt's KV came from prefill."""
    first = await pair.prefill(COMPLETIONS, BODY, "a", kv_transfer_params=FOR_PREFILL)
    params = first.json["kv_transfer_params"]
    answer = await pair.post(pair.d, COMPLETIONS, {**BODY, **fields, "kv_transfer_params": params}, "a")
    assert answer.status == 200, answer.text
    assert pair.d.state()["tokens_by_source"]["external_kv_transfer"] > 0
    assert pair.p.state()["kv_waiting"] == {} and pair.p.state()["kv_reads"] == 1
    return answer.json["choices"][0]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_decode_reads_what_prefill_holds(host: str) -> None:
    knobs = {"connector": "nixl", "host": host}
    async with running(knobs, knobs) as pair:
        assert (await answered(pair))["text"] == expected_text(PROMPT, 8)


async def test_prompt_logprobs_are_noise_where_the_kv_was_read() -> None:
    """Of tokens that it has not computed itself, no vLLM engine has logits, whichever connector brought their KV."""
    knobs = {"connector": "nixl"}
    async with running(knobs, knobs) as pair:
        choice = await answered(pair, prompt_logprobs=0)
        assert choice["text"] == expected_text(PROMPT, 8)
        found = [entry["logprob"] for position in choice["prompt_logprobs"][1:] for entry in position.values()]
        assert all(abs(value) > 1e29 for value in found) and len(found) > 30
