"""Where vLLM versions differ, the simulated engine follows the one that its settings name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from disagg_sim import SimConfig, SimConfigError, SimEngine, encode, render_chat
from disagg_sim.api_error import InvalidBody
from disagg_sim.messages_api import to_chat
from disagg_sim.vllm_rules import NEWEST, rules_of
from tests.sim.pair import CHAT, COMPLETIONS, MESSAGES

MESSAGE = [{"role": "user", "content": "a" * 100}]
LENGTH = len(encode(render_chat(MESSAGE)))
REST = LENGTH % 16
BODY = {"model": "sim-model", "messages": MESSAGE, "max_tokens": 5}
VERSIONS = ["0.21.0", "0.23.0", "0.24.0", "0.26.0", "0.31.0", "0.32.0", "0.33.0"]

Post = Callable[..., Any]


@asynccontextmanager
async def engine(version: str, **knobs: Any) -> AsyncIterator[Post]:
    """An engine that computes alone; a call posts to it and gives status and JSON."""
    one = SimEngine(SimConfig(role="decode", connector="disagg_kv", version=version, **knobs))
    await one.start()
    try:
        async with aiohttp.ClientSession() as http:

            async def post(path: str, body: Any) -> tuple[int, Any]:
                async with http.post(f"http://{one.http_address}{path}", json=body) as answer:
                    return answer.status, await answer.json()

            yield post
    finally:
        await one.kill()


@pytest.mark.parametrize("version", VERSIONS)
async def test_null_as_max_tokens_of_completions(version: str) -> None:
    async with engine(version, max_model_len=100) as post:
        _, answer = await post(COMPLETIONS, {"prompt": [7] * 10, "max_tokens": None, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == (90 if version < "0.24" else 16)
    assert answer["system_fingerprint"] == f"vllm-{version}-sim"


@pytest.mark.parametrize("version", VERSIONS)
async def test_usage_of_a_prompt_that_is_not_cached(version: str) -> None:
    async with engine(version, enable_prompt_tokens_details=True) as post:
        _, completion = await post(COMPLETIONS, {"prompt": [7] * 40, "max_tokens": 2})
        _, chat = await post(CHAT, BODY)
        _, message = await post(MESSAGES, {**BODY, "messages": [{"role": "user", "content": "b" * 100}]})
    shown = None if version < "0.24" else {"cached_tokens": 0}
    assert completion["usage"]["prompt_tokens_details"] == shown
    created = {} if version < "0.26" else {"created_cache_tokens": LENGTH - REST}
    assert chat["usage"]["prompt_tokens_details"] == (shown and {**shown, **created})
    if version < "0.24":
        assert message["usage"] == {"input_tokens": LENGTH, "output_tokens": 5}
    elif version < "0.26":
        assert message["usage"] == usage(LENGTH, 5, 0, 0)
    else:
        assert message["usage"] == usage(REST, 5, LENGTH - REST, 0)


def usage(rest: int, output: int, created: int, read: int) -> dict[str, int]:
    cache = {"cache_creation_input_tokens": created, "cache_read_input_tokens": read}
    return {"input_tokens": rest, "output_tokens": output, **cache}


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_thinking_budget_above_max_tokens(version: str) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    async with engine(version) as post:
        status, answer = await post(MESSAGES, {**BODY, "thinking": thinking})
    assert status == (200 if version < "0.31" else 400), answer


@pytest.mark.parametrize(
    ("thinking", "limit", "refused"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, 1025, ""),
        ({"type": "enabled", "budget_tokens": 1024}, 1024, "must be less than max_tokens"),
        ({"type": "enabled", "budget_tokens": 1023}, 2000, "1024"),
        ({"type": "enabled"}, 2000, "thinking"),
        ({"type": "adaptive"}, 1, ""),
        ({"type": "disabled"}, 1, ""),
        ({"type": "odd"}, 1, "thinking"),
        ("enabled", 1, "thinking"),
    ],
)
def test_a_thinking_budget_is_checked_against_the_limit(thinking, limit: int, refused: str) -> None:
    """vLLM 0.32 ``entrypoints/anthropic/protocol.py``, ``validate_thinking_budget``; NIXL's prefills are exempt."""
    rules = rules_of(NEWEST)
    body = {**BODY, "max_tokens": limit, "thinking": thinking}
    if not refused:
        kwargs = {"enable_thinking": False} if thinking["type"] == "disabled" else None
        assert to_chat(body, rules).get("chat_template_kwargs") == kwargs
        return
    with pytest.raises(InvalidBody, match=refused):
        to_chat(body, rules)
    if limit == 1024:
        to_chat({**body, "kv_transfer_params": {"do_remote_decode": True}}, rules)
        to_chat(body, rules, counting=True)


HEADER = "x-anthropic-billing-header: cc_version=1; cch=7f3"


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_billing_header_in_a_system_block(version: str) -> None:
    header, kept = ({"type": "text", "text": text} for text in (HEADER, "Be brief."))
    with_header = [{"role": "system", "content": [header, kept]}, *MESSAGE]
    async with engine(version) as post:
        counts = [
            (await post(MESSAGES, {**BODY, "system": system}))[1]["usage"]["input_tokens"]
            for system in ([header, kept], [kept])
        ]
        chats = [
            (await post(CHAT, {**BODY, "messages": messages}))[1]["usage"]["prompt_tokens"]
            for messages in (with_header, [{"role": "system", "content": "Be brief."}, *MESSAGE])
        ]
        _, one_text = await post(
            CHAT, {**BODY, "messages": [{"role": "system", "content": f"{HEADER}\nBe brief."}, *MESSAGE]}
        )
    assert counts[0] == counts[1]
    assert (chats[0] == chats[1]) is (version >= "0.32")
    assert (one_text["usage"]["prompt_tokens"] == chats[1]) is (version >= "0.32")


@pytest.mark.parametrize(
    ("connector", "version"), [("p2p_nccl", "0.21.0"), ("disagg_kv", "0.33.0"), ("nixl", "0.33.0")]
)
def test_the_default_version(connector: Any, version: str) -> None:
    assert SimConfig(connector=connector).vllm_version == version


@pytest.mark.parametrize("version", ["0", "newest", "0.x", "v0.33"])
def test_a_version_must_be_one(version: str) -> None:
    with pytest.raises(SimConfigError, match="version must be"):
        SimConfig(connector="nixl", version=version)


def test_p2p_nccl_ends_with_0_23() -> None:
    SimConfig(version="0.23.1")
    with pytest.raises(SimConfigError, match=r"0\.24\.0 has no P2pNcclConnector"):
        SimConfig(version="0.24.0")


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0"])
async def test_responses(version: str) -> None:
    assert rules_of(version).responses_transfer_kv is (version >= "0.19")
    body = {"model": "sim-model", "input": "a" * 100, "max_output_tokens": 3}
    async with engine(version) as post:
        _, answer = await post("/v1/responses", body)
        _, again = await post("/v1/responses", body)
    assert answer["status"] == "incomplete" and answer["kv_transfer_params"] is None
    details = [one["usage"]["input_tokens_details"] for one in (answer, again)]
    assert details[0]["cached_tokens"] == 0 < details[1]["cached_tokens"]
    assert [d.get("cache_write_tokens") for d in details] == ([LENGTH - REST, 0] if version >= "0.31" else [None, None])
