"""A prefill and a decode engine, spoken to directly as a P/D proxy would, step by step."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from disagg_sim import SimConfig, SimEngine

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, without [DONE]."""
        lines = [line.removeprefix("data: ") for line in self.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


class Pair:
    def __init__(self, prefill: SimEngine, decode: SimEngine, http: aiohttp.ClientSession) -> None:
        self.p = prefill
        self.d = decode
        self.http = http

    def new_id(self) -> str:
        return f"___prefill_addr_{self.p.kv_address}___decode_addr_{self.d.kv_address}_{uuid.uuid4().hex}"

    async def post(self, engine: SimEngine, path: str, body: Any, request_id: str | None = None, **kw: Any) -> Answer:
        headers = {"X-Request-Id": request_id} if request_id is not None else {}
        url = f"http://{engine.http_address}{path}"
        async with self.http.post(url, json=body, headers=headers, **kw) as response:
            return Answer(response.status, response.headers, await response.text())

    async def get(self, engine: SimEngine, path: str) -> Answer:
        async with self.http.get(f"http://{engine.http_address}{path}") as response:
            return Answer(response.status, response.headers, await response.text())

    async def prefill(self, path: str, body: Mapping[str, Any], request_id: str, **changes: Any) -> Answer:
        """The prefill leg: one token, nothing streamed."""
        leg = {key: value for key, value in body.items() if key not in ("stream", "stream_options", "min_tokens")}
        leg["max_tokens"] = 1
        if "max_completion_tokens" in leg:
            leg["max_completion_tokens"] = 1
        return await self.post(self.p, path, {**leg, **changes}, request_id)

    async def both(self, path: str, body: Mapping[str, Any], request_id: str | None = None) -> tuple[Answer, Answer]:
        request_id = request_id or self.new_id()
        first = await self.prefill(path, body, request_id)
        return first, await self.post(self.d, path, body, request_id)

    async def ask(self, prompt: str, max_tokens: int = 8) -> str:
        """A normal request through both engines."""
        _, answer = await self.both(COMPLETIONS, {"prompt": prompt, "max_tokens": max_tokens})
        assert answer.status == 200, answer.text
        return str(answer.json["choices"][0]["text"])

    async def assert_hangs(self, engine: SimEngine, stalled_on: str) -> asyncio.Task[Answer]:
        """Show that nothing moves in ``engine`` while it claims to be healthy; the request that waits comes back.

        The step loop is the only thing that can answer, and it is inside a step that waits for ``stalled_on``.
        """
        state = await engine.wait_until(lambda s: s["stalled_on"] == stalled_on)
        steps, waiting, beat = state["steps"], state["waiting"], state["http_requests"]
        prompt = f"innocent {uuid.uuid4().hex}"
        request_id = self.new_id()
        if engine is self.d and self.p.state()["stalled_on"] is None and self.p.state()["dead"] is None:
            await self.prefill(COMPLETIONS, {"prompt": prompt}, request_id)
        other = asyncio.create_task(
            self.post(engine, COMPLETIONS, {"prompt": prompt, "max_tokens": 1}, request_id), name=prompt
        )
        await engine.wait_until(lambda s: s["waiting"] > waiting)
        for _ in range(3):
            assert (await self.get(engine, "/health")).status == 200
        state = engine.state()
        assert state["http_requests"] >= beat + 4
        assert (state["steps"], state["stalled_on"]) == (steps, stalled_on)
        assert not other.done()
        return other


@asynccontextmanager
async def running(prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None) -> AsyncIterator[Pair]:
    """Both engines, started; ended again whatever has become of them."""
    pair_engines = (
        SimEngine(SimConfig(role="prefill", **(prefill or {}))),
        SimEngine(SimConfig(role="decode", **(decode or {}))),
    )
    async with aiohttp.ClientSession() as http:
        pair = Pair(*pair_engines, http)
        try:
            for engine in pair_engines:
                await engine.start()
            yield pair
        finally:
            for engine in {*pair_engines, pair.p, pair.d}:
                await engine.kill()


async def cancelled(task: asyncio.Task[Any]) -> None:
    """The client goes away."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
