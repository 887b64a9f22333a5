"""``disagg-proxy demo``: what it shows, and that nothing of it is left, whenever it is interrupted."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from disagg_sim.chaos import demo
from disagg_sim.chaos.demo import main
from tests.command import MODULE, ROOT

_LONG = 60.0
"""Seconds; a machine that runs other tests too is slow."""


class Demo:
    """The command as a process in a session of its own, and what it has written so far."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.written = ""

    async def until(self, pattern: str) -> None:
        assert self.process.stdout is not None
        while not re.search(pattern, self.written):
            line = await asyncio.wait_for(self.process.stdout.readline(), _LONG)
            assert line, self.written
            self.written += line.decode()

    async def end(self) -> int:
        rest, _ = await asyncio.wait_for(self.process.communicate(), _LONG)
        self.written += rest.decode()
        assert self.process.returncode is not None
        return self.process.returncode

    def left_nothing(self) -> None:
        """No file, no listener, no process of its session."""
        assert list(self.folder.iterdir()) == []
        found = re.search(r"live page: http://127\.0\.0\.1:(\d+)/", self.written)
        assert found is not None, self.written
        with socket.socket() as one:
            assert one.connect_ex(("127.0.0.1", int(found[1]))) != 0
        with pytest.raises(ProcessLookupError):
            os.killpg(self.process.pid, 0)
        assert "Traceback" not in self.written


Start = Callable[[float], Awaitable[Demo]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    started: list[asyncio.subprocess.Process] = []

    async def run(seconds: float) -> Demo:
        process = await asyncio.create_subprocess_exec(
            *MODULE, "demo", "--seconds", str(seconds), cwd=ROOT, start_new_session=True,
            env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        started.append(process)
        return Demo(process, tmp_path)

    yield run
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_it_shows_a_freeze_and_its_healing_and_ends_by_itself(start: Start) -> None:
    demonstration = await start(8)
    assert await demonstration.end() == 0, demonstration.written
    lines = demonstration.written.splitlines()
    told = iter(lines)
    for part in (
        r"2 simulated prefill and 2 simulated decode engines: http://127\.0\.0\.1:\d+/v1$",
        r"live page: http://127\.0\.0\.1:\d+/ .* ends in 8 s",
        r" s  load: 10 requests/s",
        r" s  prefill .* stops computing; its /health still answers 200",
        r" s  the proxy moves its requests elsewhere: prefill .* is stalled",
        r" s  prefill .* computes again",
        r" s  the proxy sends requests to prefill .* again",
        r" s  [1-9]\d answers right, none failed; the slowest took .* s; 4 of 4 pairs are ready",
        r"^Done\. Nothing is left behind\.",
    ):
        assert any(re.search(part, line) for line in told), f"{part!r} is not in its place: {demonstration.written}"
    assert max(map(len, lines)) <= 160
    demonstration.left_nothing()


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("live page", signal.SIGINT), ("load:", signal.SIGTERM), ("answers right", signal.SIGINT),
        ("stops computing", signal.SIGINT), ("moves its requests", signal.SIGTERM),
    ],
)  # fmt: skip
async def test_it_is_ended_at_any_moment(start: Start, moment: str, number: int) -> None:
    demonstration = await start(20)
    await demonstration.until(moment)
    demonstration.process.send_signal(number)
    assert await demonstration.end() == 0
    assert demonstration.written.endswith("Stopped. Nothing is left behind.\n")
    demonstration.left_nothing()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144])
async def test_a_cancelled_start_ends_at_once(steps: int) -> None:
    tasks = asyncio.all_tasks()
    starting = asyncio.ensure_future(demo._run(5.0))
    for _ in range(steps):
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(starting, _LONG)
    assert asyncio.all_tasks() == tasks


@pytest.mark.parametrize("text", ["0", "-3", "nan", "inf", "long", "1e9"])
def test_a_bad_duration_is_named(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--seconds", text])
    assert stopped.value.code == 2 and "--seconds" in capsys.readouterr().err


async def test_a_wrong_answer_is_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wrong(seconds: float) -> bool:
        return False

    async def no_start(seconds: float) -> bool:
        raise RuntimeError("not ready")

    for run in (wrong, no_start):
        monkeypatch.setattr(demo, "_run", run)
        assert await demo._until_signal(1.0) == 1
