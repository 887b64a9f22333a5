"""What users do, on two real GPUs: every shape of request through the proxy, P to D over NCCL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from tests.gpu.conftest import CHUNK, SERVED, Machine

COMPLETIONS, CHAT, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/messages"
HELLO = [{"role": "user", "content": "Tell me about San Francisco"}]
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
SENTENCE = "San Francisco is a city that was built on hills beside the sea, "

Record = Callable[..., None]


async def post(url: str, path: str, body: dict[str, Any], timeout: float = 120) -> tuple[int, Any]:
    """Status and JSON (or raw text of a stream)."""
    limit = aiohttp.ClientTimeout(total=timeout)
    async with (
        aiohttp.ClientSession(timeout=limit) as http,
        http.post(url + path, json={"model": SERVED, **body}) as answer,
    ):
        text = await answer.text()
        streamed = answer.headers["Content-Type"].startswith("text/event-stream")
        return answer.status, text if streamed else json.loads(text)


def transferred(machine: Machine) -> float:
    """Prompt tokens whose KV came to D from P."""
    text = machine.get(machine.decode + "/metrics")
    pattern = r'vllm:prompt_tokens_by_source_total\{[^}]*source="external_kv_transfer"[^}]*\} (\S+)'
    return sum(map(float, re.findall(pattern, text)))


async def healthy(machine: Machine) -> None:
    status, body = await post(machine.proxy, COMPLETIONS, {"prompt": SENTENCE, "max_tokens": 4}, timeout=90)
    assert status == 200 and body["usage"]["completion_tokens"] == 4


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (COMPLETIONS, {"prompt": SENTENCE, "max_tokens": 16}),
    "chat": (CHAT, {"messages": HELLO, "max_tokens": 16}),
    "chat with max_completion_tokens": (CHAT, {"messages": HELLO, "max_completion_tokens": 16}),
    "messages": (MESSAGES, {"messages": HELLO, "max_tokens": 16}),
    "n": (COMPLETIONS, {"prompt": SENTENCE, "n": 2, "temperature": 0.8, "max_tokens": 8}),
    "prompt list": (COMPLETIONS, {"prompt": [SENTENCE, SENTENCE * 3], "max_tokens": 8}),
    "token ids": (COMPLETIONS, {"prompt": list(range(10, 90)), "max_tokens": 8}),
    "lists of token ids": (COMPLETIONS, {"prompt": [[5, 6, 7], list(range(10, 60))], "max_tokens": 8}),
    "one-token prompt": (COMPLETIONS, {"prompt": [77], "max_tokens": 8}),
    "one token": (COMPLETIONS, {"prompt": SENTENCE, "max_tokens": 1}),
    "min_tokens": (COMPLETIONS, {"prompt": SENTENCE, "min_tokens": 8, "max_tokens": 8}),
    "logprobs": (COMPLETIONS, {"prompt": SENTENCE, "logprobs": 3, "max_tokens": 4}),
    "echo": (COMPLETIONS, {"prompt": SENTENCE, "echo": True, "max_tokens": 4}),
    "stream": (COMPLETIONS, {"prompt": SENTENCE, "stream": True, "max_tokens": 16}),
    "stream with usage": (
        CHAT,
        {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 16},
    ),
    "prompt logprobs from P": (COMPLETIONS, {"prompt": SENTENCE, "prompt_logprobs": 1, "max_tokens": 1}),
    "evaluation": (COMPLETIONS, {"prompt": SENTENCE, "echo": True, "logprobs": 1, "max_tokens": 0}),
    "json object": (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}, "max_tokens": 24}),
    "named tool": (
        CHAT,
        {"messages": HELLO, "tools": [TOOL], "max_tokens": 60,
         "tool_choice": {"type": "function", "function": {"name": "look_up"}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
async def test_every_shape_of_request(machine: Machine, name: str) -> None:
    path, body = SHAPES[name]
    status, answer = await post(machine.proxy, path, body)
    assert status == 200, answer
    assert "___prefill_addr" not in json.dumps(answer)
    await healthy(machine)


async def test_kv_really_comes_from_prefill(machine: Machine, record: Record) -> None:
    before = transferred(machine)
    status, body = await post(machine.proxy, COMPLETIONS, {"prompt": list(range(100, 1100)), "max_tokens": 4})
    assert status == 200 and body["usage"]["prompt_tokens"] == 1000
    moved = transferred(machine) - before
    record("transfer", prompt_tokens=1000, tokens_from_prefill=moved)
    assert moved >= 900


async def test_a_prompt_of_several_prefill_chunks(machine: Machine, record: Record) -> None:
    prompt = [10 + i % 4000 for i in range(9000)]
    assert len(prompt) > 2 * CHUNK
    before, begun = transferred(machine), time.monotonic()
    status, body = await post(machine.proxy, COMPLETIONS, {"prompt": prompt, "max_tokens": 8})
    assert status == 200, body
    record("9000 tokens in chunks", seconds=round(time.monotonic() - begun, 3), chunk=CHUNK)
    assert transferred(machine) - before >= 8900


async def test_200_requests_at_once(machine: Machine, record: Record) -> None:
    async def one(i: int) -> int:
        body = {"prompt": f"{i}. {SENTENCE * (1 + i % 8)}", "max_tokens": 64, "ignore_eos": True}
        status, answer = await post(machine.proxy, COMPLETIONS, body)
        return status if answer["usage"]["completion_tokens"] == 64 else -1

    begun = time.monotonic()
    found = await asyncio.gather(*(one(i) for i in range(200)))
    record("200 requests of 64 tokens at once", seconds=round(time.monotonic() - begun, 2))
    assert found == [200] * 200


async def first_token(url: str, body: dict[str, Any]) -> dict[str, float]:
    """Logprobs of the likeliest first tokens."""
    status, answer = await post(url, COMPLETIONS, {**body, "max_tokens": 1, "logprobs": 10, "temperature": 0})
    assert status == 200, answer
    found: dict[str, float] = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return found


def distance(one: dict[str, float], other: dict[str, float]) -> float:
    """Largest difference of a logprob among the tokens that both name, of which there must be most."""
    shared = one.keys() & other.keys()
    assert len(shared) >= 6, (one, other)
    return max(abs(one[token] - other[token]) for token in shared)


async def test_first_token_logprobs_are_those_of_a_plain_engine(machine: Machine, plain: str, record: Record) -> None:
    """Two comparisons, since kernels round differently when they compute many tokens at once or one.

    A warm plain engine has all but the last token of these lengths (1 more than whole blocks of 16) in its prefix
    cache and computes that one token, as decode does: the same to the bit, or nearly. A cold one computes the prompt
    at once: within what the plain engine differs from itself.
    """
    same_way: list[float] = []
    other_way: list[float] = []
    noise: list[float] = []
    for length in (33, 513, 2001, 6001):
        for seed in (3, 11, 29):
            prompt = [20 + (seed * i + length) % 3000 for i in range(length)]
            cold = await first_token(plain, {"prompt": prompt})
            warm = await first_token(plain, {"prompt": prompt})
            split = await first_token(machine.proxy, {"prompt": prompt})
            same_way.append(distance(warm, split))
            other_way.append(distance(cold, split))
            noise.append(distance(cold, warm))
    record(
        "first-token logprobs, 12 prompts of 33 to 6,001 tokens, largest difference",
        split_from_warm_plain=round(max(same_way), 4),
        split_from_cold_plain=round(max(other_way), 4),
        warm_plain_from_cold_plain=round(max(noise), 4),
    )
    assert max(same_way) <= 0.25 * max(noise) + 0.01
    assert max(other_way) <= 2 * max(noise) + 0.1


async def test_clients_that_leave_during_long_prefills_leave_nothing(machine: Machine, record: Record) -> None:
    """8,000 tokens are about 1.2 GB of KV: without drains seven of them fill the 8 GB buffer and both engines stop."""
    await healthy(machine)
    drained = machine.stats()["kv_releases"]["done"]
    clients = 100

    async def leave(i: int) -> None:
        body = {"prompt": [i + 10] + [10 + (i + j) % 4000 for j in range(7999)], "max_tokens": 50}
        with contextlib.suppress(asyncio.TimeoutError):
            await post(machine.proxy, COMPLETIONS, body, timeout=0.02 + 0.02 * (i % 60))

    begun = time.monotonic()
    during = asyncio.ensure_future(healthy(machine))
    await asyncio.gather(*(leave(i) for i in range(clients)))
    await during
    await healthy(machine)
    for _ in range(240):
        requests = machine.stats()["requests"]
        if not requests["in_background"]:
            break
        await asyncio.sleep(0.5)
    stats = machine.stats()
    record(
        f"{clients} clients left during 8,000-token prefills",
        seconds_until_clean=round(time.monotonic() - begun, 1),
        drained=stats["kv_releases"]["done"] - drained,
        drains_failed=stats["kv_releases"]["failed"],
    )
    assert stats["kv_releases"]["failed"] == 0 and stats["requests"]["in_background"] == 0
    assert stats["kv_releases"]["done"] > drained
    await healthy(machine)


async def test_time_to_first_token_through_the_proxy(machine: Machine, plain: str, record: Record) -> None:
    async def ttft(url: str, prompt: list[int]) -> float:
        body = {"model": SERVED, "prompt": prompt, "max_tokens": 8, "stream": True}
        begun = time.monotonic()
        async with aiohttp.ClientSession() as http, http.post(url + COMPLETIONS, json=body) as answer:
            async for piece in answer.content.iter_any():
                if piece:
                    return time.monotonic() - begun
        raise AssertionError("no answer")

    for length in (100, 4000):
        found: dict[str, list[float]] = {"proxy": [], "plain": []}
        for i in range(12):
            prompt = [10 + (13 * i + j) % 4000 for j in range(length)]
            found["proxy"].append(await ttft(machine.proxy, prompt))
            found["plain"].append(await ttft(plain, prompt))
        medians = {name: round(sorted(times)[6] * 1000, 1) for name, times in found.items()}
        record(f"TTFT of {length} tokens, one at a time, median ms", **medians)
    await healthy(machine)


def test_the_script_says_that_all_is_well(machine: Machine) -> None:
    assert "prefill" in machine.script("test")
    assert "ready" in machine.script("status")
