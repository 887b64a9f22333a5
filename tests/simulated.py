"""A proxy with simulated prefill and decode instances behind it, as the end-to-end and the fault tests use it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from disagg_proxy.cluster.instance import State
from disagg_sim import SimConfig, SimEngine, expected_chat_text, expected_text
from tests.conftest import Proxy, Wire, running_proxy, soon

PROMPT = "San Francisco is a"
CHAT = [{"role": "user", "content": "Where is San Francisco?"}]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "sim-model", "prompt": PROMPT, "max_tokens": 8},
    "/v1/chat/completions": {"model": "sim-model", "messages": CHAT, "max_tokens": 8},
    "/v1/messages": {"model": "sim-model", "messages": CHAT, "max_tokens": 8},
}
"""A plain request for each generation route."""

RIGHT = {
    path: expected_text(PROMPT, 8) if "prompt" in body else expected_chat_text(CHAT, 8)
    for path, body in REQUESTS.items()
}
"""The right answer to each."""


def text_of(answer: dict[str, Any]) -> str:
    """The text of a whole answer, of any route."""
    if "content" in answer:
        return "".join(block["text"] for block in answer["content"])
    if "output" in answer:
        return "".join(part["text"] for item in answer["output"] for part in item["content"])
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def text_of_events(stream: list[Any], index: int = 0) -> str:
    """The text of one choice of a streamed answer, of any route."""
    text = ""
    for event in stream:
        if event.get("type") == "content_block_delta":
            text += event["delta"]["text"]
        if event.get("type") == "response.output_text.delta":
            text += event["delta"]
        for choice in event.get("choices", ()):
            if choice["index"] == index:
                text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return text


class Machine:
    """Proxy and engines of one test; engines are added as the test wants them."""

    def __init__(self, proxy: Proxy, stack: AsyncExitStack, http: aiohttp.ClientSession) -> None:
        self.proxy = proxy
        self.http = http
        self.engines: list[SimEngine] = []
        stack.push_async_callback(self._stop_engines)

    async def _stop_engines(self) -> None:
        # asyncio leaves a connection open that comes while its server closes (Python 3.11), so none may come.
        if prober := self.proxy.services.discovery._prober:
            await prober.stop()
        for _ in range(5):
            await asyncio.sleep(0)
        await asyncio.gather(*(engine.stop() for engine in self.engines))

    async def engine(self, role: str, **knobs: Any) -> SimEngine:
        engine = SimEngine(SimConfig(**{"role": role, "proxy": self.proxy.zmq, "ping_seconds": 0.2, **knobs}))
        await engine.start()
        self.engines.append(engine)
        return engine

    async def kill(self, engine: SimEngine) -> None:
        """As kill -9; return when the proxy knows that its process has ended."""
        there = self.proxy.instance(engine.http_address)
        before = there.epoch

        async def noticed() -> None:
            await self.proxy.until_state(engine.http_address, State.PROBING)
            while there.epoch == before:
                await asyncio.sleep(0)

        await engine.kill()
        await soon(noticed())

    async def restart(self, killed: SimEngine, **knobs: Any) -> SimEngine:
        """Another process on the addresses of one that was killed; return when the proxy has taken it in."""
        engine = SimEngine(replace(killed.restarted().config, **knobs))
        await engine.start()
        self.engines.append(engine)
        await soon(self.proxy.until_state(engine.http_address, State.READY))
        return engine

    async def pair(self, **knobs: Any) -> tuple[SimEngine, SimEngine]:
        engines = await self.engine("prefill", **knobs), await self.engine("decode", **knobs)
        for engine in engines:
            await self.proxy.until_state(engine.http_address, State.READY)
        return engines

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers and decoded JSON of one POST."""
        async with self.http.post(self.proxy.url + path, json=body, headers=headers) as answer:
            return answer.status, answer.headers, await answer.json()

    async def check_right(self, path: str = "/v1/completions", **changes: Any) -> None:
        """The next plain request is answered rightly."""
        status, _, body = await self.post(path, {**REQUESTS[path], **changes})
        assert status == 200, body
        assert text_of(body) == RIGHT[path]

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.proxy.url + path) as answer:
            return answer.status, await answer.json()

    async def send(self, path: str, body: bytes | str | dict[str, Any], **headers: str) -> tuple[int, Any, bytes]:
        """Status, headers and raw bytes of one POST, of whose body not a byte is changed."""
        raw = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Content-Type": "application/json", **headers}
        async with self.http.post(self.proxy.url + path, data=raw, headers=headers) as answer:
            return answer.status, answer.headers, await answer.read()

    async def stream(self, path: str, body: dict[str, Any], **headers: str) -> list[Any]:
        """The events of one streamed answer."""
        status, got, raw = await self.send(path, {**body, "stream": True}, **headers)
        assert status == 200 and got["Content-Type"].startswith("text/event-stream"), raw
        return events(raw)

    async def left(self, client: Wire) -> None:
        """Let a client go, and wait until the proxy has noticed."""
        client.leave()
        while tasks := set(self.proxy.server.server_state.tasks):
            await soon(asyncio.wait(tasks))
        await soon(self.proxy.services.shutdown.exchanges.ended())
        assert self.proxy.services.stats.in_flight == 0

    async def unharmed(self, *engines: SimEngine) -> None:
        """All work ends, no KV is left over, and no engine has died or hangs."""
        await self.proxy.until_quiet()
        for engine in engines:
            try:
                await soon(engine.wait_until(_idle))
            except asyncio.TimeoutError:
                raise AssertionError(f"not idle: {engine.state()}") from None
            assert engine.state()["dead"] is None and engine.state()["listener"] == "alive"


def _idle(state: dict[str, Any]) -> bool:
    return bool(state["dead"]) or not (
        state["running"] or state["waiting"] or state["stalled_on"] or state["kv_waiting"]
    )


_LAST_TYPES = (b'"message_stop"', b'"response.completed"', b'"response.incomplete"')


def events(stream: bytes) -> list[Any]:
    """The JSON of every data line; the stream's own end mark is checked and left out."""
    data = [line.removeprefix(b"data: ") for line in stream.splitlines() if line.startswith(b"data: ")]
    if data[-1] == b"[DONE]":
        return [json.loads(line) for line in data[:-1]]
    assert any(end in data[-1] for end in _LAST_TYPES), data[-1]
    return [json.loads(line) for line in data]


def check_error(status: int, headers: Mapping[str, str], raw: bytes, expected: int, code: str) -> str:
    """The one shape of an error; returns its message."""
    assert status == expected, raw
    assert headers["Content-Type"] == "application/json"
    body = json.loads(raw)
    assert body["type"] == "error"
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    return str(body["error"]["message"])


@pytest.fixture
async def machine(http: aiohttp.ClientSession, request: pytest.FixtureRequest) -> AsyncIterator[Machine]:
    """Mark a test with ``settings(...)`` to configure its proxy."""
    mark = request.node.get_closest_marker("settings")
    async with running_proxy(**(mark.kwargs if mark else {})) as proxy, AsyncExitStack() as stack:
        yield Machine(proxy, stack, http)


@pytest.fixture
async def pair(machine: Machine) -> tuple[SimEngine, SimEngine]:
    return await machine.pair()
