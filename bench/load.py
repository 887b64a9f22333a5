"""Clients for measurements: small requests of every kind, one after the other, and streams that stay open."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

import aiohttp

from bench.engine import MODEL

_KINDS = {
    "whole": 40,
    "stream": 44,
    "leaves in prefill": 4,
    "leaves in mid-stream": 6,
    "refused by the engine": 3,
    "not JSON": 2,
    "unknown model": 1,
}
"""Of a hundred requests."""

_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/messages")
_ODDLY = 0.1
"""Share of requests on a connection of their own."""


def body_of(route: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A small request."""
    words = "San Francisco is a city in"
    asked: dict[str, Any] = {"prompt": words}
    if route != "/v1/completions":
        asked = {"messages": [{"role": "user", "content": words}]}
    return {"model": MODEL, "max_tokens": tokens, **asked, **more}


class Clients:
    """Sends requests to one proxy.

    Attributes:
        outcomes: how many of each kind ended how.
    """

    def __init__(self, url: str, at_once: int, seed: int) -> None:
        self._url = url
        self._at_once = at_once
        self._dice = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self._kept = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._fresh = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))

    async def close(self) -> None:
        """Close every connection."""
        await self._kept.close()
        await self._fresh.close()

    async def send(self, count: int) -> None:
        """``count`` requests, a fixed number at once."""
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
        session = self._fresh if dice.random() < _ODDLY else self._kept
        if kind == "leaves in prefill":
            body["user"] = "prefill=0.05"
            try:
                await asyncio.wait_for(self._read(session, route, json.dumps(body)), 0.02)
            except asyncio.TimeoutError:
                return "left"
            return "answered"
        if kind == "leaves in mid-stream":
            body.update(user="pause=0.005", max_tokens=40, stream=True)
            return await self._read(session, route, json.dumps(body), events=3)
        if kind == "stream":
            body["stream"] = True
        elif kind == "refused by the engine":
            body["user"] = "refuse"
        elif kind == "unknown model":
            body["model"] = f"unknown-{dice.random()}"
        raw = json.dumps(body)
        return await self._read(session, route, raw[:-9] if kind == "not JSON" else raw)

    async def _read(self, session: aiohttp.ClientSession, route: str, raw: str, events: int = 0) -> str:
        head = {"Content-Type": "application/json"}
        async with session.post(self._url + route, data=raw, headers=head) as answer:
            if not events:
                await answer.read()
                return str(answer.status)
            async for _ in answer.content:
                events -= 1
                if not events:
                    answer.close()
                    return "left"
        return "ended"


class Streams:
    """Many streams that are open at once.

    Attributes:
        tokens: events that arrived, of all of them.
        open: streams whose first event is there.
    """

    def __init__(self, url: str, count: int, pause: float) -> None:
        self._url = url
        self._count = count
        self._pause = pause
        self.tokens = self.open = self.failed = 0
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open all, and return when each has its first event."""
        for number in range(self._count):
            self._tasks.append(asyncio.create_task(self._follow(_ROUTES[number % len(_ROUTES)])))
            if number % 50 == 49:
                await asyncio.sleep(0.05)
        while self.open + self.failed < self._count:
            await asyncio.sleep(0.05)

    async def _follow(self, route: str) -> None:
        body = body_of(route, 30_000, stream=True, user=f"pause={self._pause}")
        begun = False
        try:
            async with self._session.post(self._url + route, json=body, timeout=aiohttp.ClientTimeout()) as answer:
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        self.tokens += 1
                        self.open += not begun
                        begun = True
        except aiohttp.ClientError:
            pass
        self.failed += 1
        self.open -= begun

    async def stop(self) -> None:
        """Leave them all."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()
