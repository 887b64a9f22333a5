"""Mixed load for :mod:`bench.memory`: small requests of every kind, and streams that stay open."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from typing import Any

from bench.engine import MODEL
from disagg_report.load_client import Broken, LoadClient, Response

_KINDS = {
    "whole": 40,
    "stream": 44,
    "leaves in prefill": 4,
    "leaves in mid-stream": 6,
    "refused by the engine": 3,
    "not JSON": 2,
    "unknown model": 1,
}
"""Kind -> share in per cent."""

_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/messages")
_FRESH_CONNECTION = 0.1
"""Share of requests on a new connection."""


def body_of(route: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A small request."""
    words = "San Francisco is a city in"
    prompt: dict[str, Any] = {"prompt": words}
    if route != "/v1/completions":
        prompt = {"messages": [{"role": "user", "content": words}]}
    return {"model": MODEL, "max_tokens": tokens, **prompt, **more}


class Clients:
    """Sends requests to one proxy.

    Attributes:
        outcomes: how many of each kind ended how.
    """

    def __init__(self, url: str, at_once: int, seed: int) -> None:
        self._at_once = at_once
        self._dice = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self._kept = LoadClient(url)
        self._fresh = LoadClient(url, reuse=False)

    def close(self) -> None:
        """Close the idle connections."""
        self._kept.close()

    async def send(self, count: int) -> None:
        """Send ``count`` requests, a fixed number at once."""
        left = iter(range(count))

        async def work() -> None:
            for _ in left:
                kind = self._dice.choices(list(_KINDS), list(_KINDS.values()))[0]
                self.outcomes[f"{kind}: {await self._one(kind)}"] += 1

        await asyncio.gather(*(work() for _ in range(self._at_once)))

    async def _one(self, kind: str) -> str:
        dice = self._dice
        route = dice.choice(_ROUTES)
        body = body_of(route, dice.randrange(1, 9))
        client = self._fresh if dice.random() < _FRESH_CONNECTION else self._kept
        if kind == "leaves in prefill":
            body["user"] = "prefill=0.05"
            try:
                await asyncio.wait_for(self._read(client, route, json.dumps(body)), 0.02)
            except asyncio.TimeoutError:
                return "left"
            return "answered"
        if kind == "leaves in mid-stream":
            body.update(user="pause=0.005", max_tokens=40, stream=True)
            return await self._read(client, route, json.dumps(body), events=3)
        if kind == "stream":
            body["stream"] = True
        elif kind == "refused by the engine":
            body["user"] = "refuse"
        elif kind == "unknown model":
            body["model"] = f"unknown-{dice.random()}"
        raw = json.dumps(body)
        return await self._read(client, route, raw[:-9] if kind == "not JSON" else raw)

    async def _read(self, client: LoadClient, route: str, raw: str, events: int = 0) -> str:
        response = await client.post(route, raw.encode(), _FirstEvents(events) if events else Response())
        if not events:
            return str(response.status)
        return "left" if response.left else "ended"


class _FirstEvents(Response):
    """A stream that the client leaves after so many events."""

    def __init__(self, count: int) -> None:
        super().__init__(stream=True)
        self._left_to_read = count

    def event(self, event: bytes, arrived: float) -> bool:
        self._left_to_read -= 1
        return not self._left_to_read


class _Counted(Response):
    """A stream whose events are counted, but not kept."""

    def __init__(self, streams: Streams) -> None:
        super().__init__(stream=True)
        self._streams = streams
        self.begun = False

    def event(self, event: bytes, arrived: float) -> bool:
        self._streams.tokens += 1
        self._streams.open += not self.begun
        self.begun = True
        return False


class Streams:
    """Many streams that are open at once.

    Attributes:
        tokens: events that arrived, of all of them.
        open: streams whose first event has arrived.
    """

    def __init__(self, url: str, count: int, pause: float) -> None:
        self._count = count
        self._pause = pause
        self.tokens = self.open = self.failed = 0
        self._client = LoadClient(url)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open all streams, and return when each has its first event."""
        for number in range(self._count):
            self._tasks.append(asyncio.create_task(self._follow(_ROUTES[number % len(_ROUTES)])))
            if number % 50 == 49:
                await asyncio.sleep(0.05)
        while self.open + self.failed < self._count:
            await asyncio.sleep(0.05)

    async def _follow(self, route: str) -> None:
        body = json.dumps(body_of(route, 30_000, stream=True, user=f"pause={self._pause}")).encode()
        response = _Counted(self)
        with contextlib.suppress(Broken):
            await self._client.post(route, body, response)
        self.failed += 1
        self.open -= response.begun

    async def stop(self) -> None:
        """Close all streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
