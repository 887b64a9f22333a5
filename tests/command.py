"""The command as a process, for tests of what only processes show."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from disagg_sim import SimConfig, SimEngine
from tests.conftest import soon

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = [sys.executable, str(ROOT / "disagg_prefill_proxy_server.py")]
MODULE = [sys.executable, "-m", "disagg_proxy"]
LOCAL = {"HTTP_PROXY_HOST": "127.0.0.1", "HTTP_PROXY_PORT": "0", "PROXY_HOST": "127.0.0.1", "PROXY_PORT": "0"}


class Command:
    """One run of the command, and what it has written to standard error so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.written = ""
        self.url = self.zmq = ""

    async def until_written(self, pattern: str) -> re.Match[str]:
        """Read on until ``pattern`` is found in all that was written."""
        while not (found := re.search(pattern, self.written, re.DOTALL)):
            line = await soon(self.process.stderr.readline())
            assert line, self.written
            self.written += line.decode()
        return found

    async def until_ready(self) -> Command:
        self.url, self.zmq = (
            await self.until_written(r"Serving on (http://\S+:\d+).*may register on (\S+:\d+)")
        ).groups()
        return self

    async def until_serving(self) -> None:
        await self.until_written(r"prefill \S+ is ready")
        await self.until_written(r"decode \S+ is ready")

    async def end(self, signal_number: int | None = None) -> int:
        """The exit code; all that was written is in ``written`` then."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        _, rest = await soon(self.process.communicate())
        self.written += rest.decode()
        return self.process.returncode


Run = Callable[..., Awaitable[Command]]
Engines = Callable[..., Awaitable[list[SimEngine]]]


@asynccontextmanager
async def commands() -> AsyncIterator[Run]:
    """Starts the command with an environment of its own; kills what a failed test has left running."""
    started: list[Command] = []

    async def start(*flags: str, entry: list[str] = MODULE, cwd: Path = ROOT, **settings: str) -> Command:
        process = await asyncio.create_subprocess_exec(
            *entry,
            *flags,
            cwd=cwd,
            env={"PATH": os.environ["PATH"], **LOCAL, **settings},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        started.append(Command(process))
        return started[-1]

    yield start
    for command in started:
        if command.process.returncode is None:
            command.process.kill()
            await command.process.communicate()


@asynccontextmanager
async def engine_pairs() -> AsyncIterator[Engines]:
    """Starts a prefill and a decode that ping a registration port; stops them at the end."""
    async with AsyncExitStack() as stack:

        async def start(zmq: str | None, **knobs: Any) -> list[SimEngine]:
            knobs = {"proxy": zmq, "ping_seconds": 0.1, **knobs}
            pair = [SimEngine(SimConfig(role=role, **knobs)) for role in ("prefill", "decode")]
            for engine in pair:
                await engine.start()
                stack.push_async_callback(engine.stop)
            return pair

        yield start


class EngineProcess:
    """A simulated engine as a process of its own, for signals that stop it as a whole."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self.child = child
        self.http_address = self.kv_address = ""

    async def until_ready(self) -> None:
        assert self.child.stdout is not None
        words = (await soon(self.child.stdout.readline())).decode().split()
        found = dict(word.split("=", 1) for word in words[1:])
        self.http_address, self.kv_address = found["http"], found["kv"]

    def stop(self) -> None:
        self.child.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.child.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        self.child.kill()
        await self.child.wait()


@asynccontextmanager
async def engine_process(role: str, proxy: str | None, *flags: str) -> AsyncIterator[EngineProcess]:
    """An engine that pings ``proxy``, if that is given, and serves; killed at the end."""
    pings = ["--proxy", proxy, "--ping-seconds", "0.1"] if proxy else []
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "disagg_sim", "--role", role, "--port", "0", "--kv-port", "0"),
        *("--time-per-output-token", "0", *pings, *flags),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        engine = EngineProcess(child)
        await engine.until_ready()
        yield engine
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()
