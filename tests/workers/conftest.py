"""A proxy of several processes, and a kept connection to each of them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest

from disagg_sim import SimEngine
from tests.command import Command, Engines, commands, engine_pairs
from tests.conftest import soon

ASK = {"model": "sim-model", "prompt": "San Francisco is a", "max_tokens": 8}
PATH = "/v1/completions"


class Door:
    """One kept connection, and so one worker."""

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        connector = aiohttp.TCPConnector(limit=1, keepalive_timeout=300)
        self.session = aiohttp.ClientSession(connector=connector, headers=headers)
        self._url = url
        self.worker = -1

    async def get(self, path: str, **headers: str) -> Any:
        async with self.session.get(self._url + path, headers=headers) as answer:
            return await answer.json()

    async def text(self, path: str) -> str:
        async with self.session.get(self._url + path) as answer:
            return await answer.text()

    async def post(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        async with self.session.post(self._url + path, json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    async def ask(self, **changes: Any) -> tuple[int, Any]:
        return await self.post(PATH, {**ASK, **changes})

    async def begin_stream(self, **changes: Any) -> aiohttp.ClientResponse:
        """A streamed answer, its first bytes read."""
        body = {**ASK, "max_tokens": 40, "stream": True, **changes}
        answer = await soon(self.session.post(self._url + PATH, json=body))
        assert answer.status == 200
        await soon(answer.content.readany())
        return answer

    async def instance(self, engine: SimEngine) -> dict[str, Any]:
        stats = await self.get("/stats")
        return next(i for i in stats["instances"] if i["http_address"] == engine.http_address)


class Fleet:
    """A running proxy; what it writes is read all the time."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self.process = command.process
        self.lines: list[str] = []
        self.url = self.zmq = ""
        self.headers: dict[str, str] = {}
        """Of every request through :meth:`door`."""
        self._more = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())
        self.stack = AsyncExitStack()
        self.seen: set[int] = set()

    async def _read(self) -> None:
        while line := await self.process.stderr.readline():
            async with self._more:
                self.lines.append(line.decode())
                self._more.notify_all()
        async with self._more:
            self._more.notify_all()

    @property
    def written(self) -> str:
        return "".join(self.lines)

    async def until_written(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Wait for it in the lines from ``after`` on."""

        async def found() -> re.Match[str]:
            async with self._more:
                while not (match := re.search(pattern, "".join(self.lines[after:]), re.DOTALL)):
                    assert not self._reading.done(), self.written
                    await self._more.wait()
                return match

        return await soon(found())

    async def until_ready(self) -> None:
        match = await self.until_written(r"Serving on (http://\S+:\d+).*may register on (\S+:\d+)")
        self.url, self.zmq = match.groups()

    async def until_known(self, engine: SimEngine, workers: int = 2, after: int = 0) -> None:
        """Every worker says that it is ready."""
        where = re.escape(engine.http_address)
        for worker in range(workers):
            await self.until_written(rf"worker {worker} [^\n]*{where} is ready", after)

    async def until_gone(self, engine: SimEngine, after: int, workers: int = 2) -> None:
        """Every worker has noticed that its process has ended."""
        where = re.escape(engine.http_address)
        said = "is probing: its (process has ended|HTTP port refuses)"
        for worker in range(workers):
            await self.until_written(rf"worker {worker} [^\n]*{where} {said}", after)

    async def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.returncode is None:
            self.process.send_signal(number)
        code = await soon(self.process.wait())
        await soon(self._reading)
        return code

    async def door(self) -> Door:
        door = Door(self.url, self.headers)
        self.stack.push_async_callback(door.session.close)
        stats = await soon(door.get("/stats"))
        self.seen |= {worker["pid"] for worker in stats["workers"] if worker["pid"]}
        door.worker = stats["answered_by"]
        return door

    async def doors(self, workers: int = 2) -> list[Door]:
        """One into each worker."""
        found: dict[int, Door] = {}
        for _ in range(20 * workers):
            door = await self.door()
            found.setdefault(door.worker, door)
            if len(found) == workers:
                return [found[number] for number in range(workers)]
        raise AssertionError(f"only {sorted(found)} answer")

    async def pids(self) -> list[int]:
        door = await self.door()
        return [worker["pid"] for worker in (await door.get("/stats"))["workers"]]

    async def close(self) -> None:
        await self.stack.aclose()
        if self.process.returncode is None:
            self.process.kill()
            for pid in self.seen:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        await self.process.wait()
        await self._reading


Start = Callable[..., Awaitable[Fleet]]


@asynccontextmanager
async def fleets() -> AsyncIterator[Start]:
    async with commands() as run, AsyncExitStack() as stack:

        async def start(workers: int = 2, **settings: str) -> Fleet:
            more = {"SHUTDOWN_GRACE": "5", "PROBE_INTERVAL": "2", "LOG_LEVEL": "debug", **settings}
            fleet = Fleet(await run("--workers", str(workers), **more))
            stack.push_async_callback(fleet.close)
            await fleet.until_ready()
            return fleet

        yield start


@pytest.fixture
async def fleet() -> AsyncIterator[Start]:
    async with fleets() as start:
        yield start


@pytest.fixture
async def engines() -> AsyncIterator[Engines]:
    async with engine_pairs() as start:
        yield start


def samples(metrics: str) -> dict[str, float]:
    """The numbers of a /metrics text, by name with labels."""
    lines = [line for line in metrics.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until it holds: what another process does tells nobody here."""

    async def ask() -> None:
        while not await condition():
            await asyncio.sleep(0.02)

    await soon(ask())


def shown(stats: Any) -> str:
    return json.dumps(stats, indent=1)
