"""What `vllm bench serve` sends (vLLM 0.9.2 - 0.32, ``vllm/benchmarks``), against the proxy."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from disagg_sim import encode, expected_text, render_chat

COUNT = 50
LENGTH = 24


class Handler:
    """Its reader of event streams: whole messages only, as ``StreamedResponseHandler``."""

    def __init__(self) -> None:
        self.buffer = ""

    def add(self, chunk: bytes) -> list[str]:
        *whole, self.buffer = (self.buffer + chunk.decode()).split("\n\n")
        return [message.strip().removeprefix("data: ") for message in whole if message.strip()]


def request(backend: str, prompt: str) -> tuple[str, dict[str, Any]]:
    common = {
        "model": "sim-model",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "ignore_eos": True,
    }
    if backend == "openai":
        more = {"prompt": prompt, "repetition_penalty": 1.0, "max_tokens": LENGTH, "logprobs": None}
        return "/v1/completions", {**common, **more}
    content = [{"type": "text", "text": prompt}]
    return "/v1/chat/completions", {
        **common,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": LENGTH,
    }


async def one(machine, backend: str, number: int) -> tuple[str, int, str]:
    """Text, output tokens and the request id that came back."""
    path, body = request(backend, f"Benchmark prompt {number} " + "of many words " * 20)
    handler, text, tokens, ended = Handler(), "", 0, False
    headers = {"x-request-id": f"bench-{number}"}
    async with machine.http.post(machine.proxy.url + path, json=body, headers=headers) as answer:
        assert answer.status == 200
        async for chunk in answer.content.iter_any():
            for message in handler.add(chunk):
                if message == "[DONE]":
                    ended = True
                elif choices := (data := json.loads(message))["choices"]:
                    text += choices[0]["text"] if backend == "openai" else choices[0]["delta"].get("content") or ""
                else:
                    tokens = data["usage"]["completion_tokens"]
        assert ended
        return text, tokens, answer.headers["X-Request-Id"]


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
async def test_fifty_streams_at_once_between_its_other_requests(machine, pair, backend) -> None:
    async def metrics() -> None:
        async with machine.http.get(machine.proxy.url + "/metrics") as answer:
            assert answer.status == 200 and await answer.text()

    status, _, _ = await machine.post("/tokenize", {"model": "sim-model", "prompt": "one"})
    assert status == 200
    await one(machine, backend, 1000)
    for _ in range(2):
        await metrics()
    found = await asyncio.gather(*(one(machine, backend, number) for number in range(COUNT)))
    for _ in range(2):
        await metrics()
    for number, (text, tokens, own_id) in enumerate(found):
        prompt = f"Benchmark prompt {number} " + "of many words " * 20
        if backend != "openai":
            prompt = render_chat([{"role": "user", "content": prompt}])
        assert (text, tokens) == (expected_text(encode(prompt), LENGTH, ignore_eos=True), LENGTH)
        assert own_id == f"bench-{number}"
    path = request(backend, "")[0]
    for engine in pair:
        assert len({got.headers["X-Request-Id"] for got in engine.received(path)}) == COUNT + 1
        assert not any("bench" in got.headers["X-Request-Id"] for got in engine.received(path))
    await machine.unharmed(*pair)
    _, stats = await machine.get("/stats")
    assert stats["requests"]["outcomes"] == {"ok": COUNT + 1} and stats["requests"]["in_flight"] == 0
    assert [shown["in_flight"] for shown in stats["instances"]] == [0, 0]
