"""The size of an engine's KV cache: what /metrics show of it, and requests that find no blocks."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from disagg_sim import SimConfig, encode, expected_text
from disagg_sim.config import SimConfigError
from tests.conftest import soon

from .pair import COMPLETIONS, running

OWN = {"connector": "disagg_kv"}
PROMPT = " ".join(f"word{n}" for n in range(40))
TOKENS = len(encode(PROMPT))


def usage(metrics: str) -> float:
    found = re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", metrics, re.M)
    assert found is not None
    return float(found[1])


async def test_metrics_show_the_cache_as_vllm_does() -> None:
    size: dict[str, Any] = {"kv_cache_tokens": 65_000}
    async with running(OWN | size, OWN | size | {"prefix_cache_blocks": 0}) as pair:
        assert 'vllm:cache_config_info{block_size="16",cache_dtype="auto",enable_prefix_caching="True",' in (
            text := (await pair.get(pair.p, "/metrics")).text
        )
        assert 'kv_cache_size_tokens="64992",num_gpu_blocks="4062",engine="0"} 1.0' in text and usage(text) == 0.0
        assert 'enable_prefix_caching="False"' in pair.d.metrics()
    async with running(size, size) as older:
        assert 'num_gpu_blocks="4062"' in older.p.metrics() and "kv_cache_size_tokens" not in older.p.metrics()


async def test_running_requests_and_held_kv_use_the_cache() -> None:
    blocks = 4062
    async with running(OWN | {"kv_cache_tokens": blocks * 16}, OWN) as pair:
        body = {"prompt": PROMPT, "max_tokens": 1, "kv_transfer_params": {"transfer_id": "0" * 32}}
        with pair.p.faults.held("answer"):
            leg = asyncio.create_task(pair.post(pair.p, COMPLETIONS, body))
            await soon(pair.p.wait_until(lambda s: s["held_at"] == "answer"))
            assert usage(pair.p.metrics()) == pytest.approx((TOKENS // 16 + 1) / blocks)
        assert (await leg).status == 200
        # Decode has not fetched it.
        assert usage(pair.p.metrics()) == pytest.approx(-(-TOKENS // 16) / blocks)


async def test_a_request_that_finds_no_blocks_waits() -> None:
    blocks = TOKENS // 16 + 2
    small: dict[str, Any] = {"max_model_len": blocks * 16 - 16, "kv_cache_tokens": blocks * 16}
    async with running(OWN, OWN | small) as pair:
        body = {"prompt": PROMPT, "max_tokens": 4}
        with pair.d.faults.held("schedule"):
            both = [asyncio.create_task(pair.post(pair.d, COMPLETIONS, body)) for _ in range(2)]
            await soon(pair.d.wait_until(lambda s: s["waiting"] == 2 and s["held_at"] == "schedule"))
            pair.d.faults.hold("forward")
        state = await soon(pair.d.wait_until(lambda s: s["held_at"] == "forward"))
        assert (state["running"], state["waiting"]) == (1, 1) and usage(pair.d.metrics()) > 0.5
        pair.d.faults.release()
        for answer in await asyncio.gather(*both):
            assert answer.json["choices"][0]["text"] == expected_text(PROMPT, 4)
        assert usage(pair.d.metrics()) == 0.0


async def test_the_newest_request_gives_its_blocks_to_older_ones() -> None:
    # Both prompts fit, their answers do not.
    blocks = 2 * (TOKENS // 16 + 1)
    small: dict[str, Any] = {"max_model_len": blocks * 16 - 16, "kv_cache_tokens": blocks * 16}
    async with running(OWN, OWN | small) as pair:
        body = {"prompt": PROMPT, "max_tokens": 40}
        with pair.d.faults.held("schedule"):
            both = [asyncio.create_task(pair.post(pair.d, COMPLETIONS, body)) for _ in range(2)]
            await soon(pair.d.wait_until(lambda s: s["waiting"] == 2 and s["held_at"] == "schedule"))
        for answer in await asyncio.gather(*both):
            assert answer.json["choices"][0]["text"] == expected_text(PROMPT, 40)
        metrics = pair.d.metrics()
        assert re.search(r"^vllm:num_preemptions_total\{.*\} 1\.0$", metrics, re.M) and usage(metrics) == 0.0


def test_the_cache_holds_a_request_of_full_length() -> None:
    SimConfig(max_model_len=1000, kv_cache_tokens=1016)
    with pytest.raises(SimConfigError, match=r"kv_cache_tokens must hold one request .* at least 1016; a lower max_"):
        SimConfig(max_model_len=1000, kv_cache_tokens=1015)
