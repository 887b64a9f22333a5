"""A decode engine that is killed under load on real GPUs: the script's supervision brings the machine back."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Iterator

import aiohttp
import pytest

from tests.gpu.conftest import SERVED, Machine

COMPLETIONS = "/v1/completions"
_BACK_SECONDS = 240


@pytest.fixture
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The machine as the script starts it by default, on ports of its own."""
    found = Machine(tmp_path_factory.mktemp("supervised"), {"PREFILL_KV_PORT": "21501", "DECODE_KV_PORT": "22501"})
    try:
        found.script("all", "--supervise")
        yield found
    finally:
        found.script("stop")


async def outcome(machine: Machine, seconds: float = 60) -> str:
    """How one request ended: its status, "cut" or "hung"."""
    body = {"model": SERVED, "prompt": "San Francisco is a", "max_tokens": 200, "stream": True, "ignore_eos": True}
    timeout = aiohttp.ClientTimeout(total=seconds)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.post(machine.proxy + COMPLETIONS, json=body) as answer,
        ):
            await answer.read()
            return str(answer.status)
    except asyncio.TimeoutError:
        return "hung"
    except aiohttp.ClientError:
        return "cut"


def pid_of(machine: Machine, name: str) -> int:
    found = re.search(rf"^{name} +\S+ +(\d+) ", machine.script("status"), re.M)
    assert found is not None
    return int(found[1])


async def test_a_decode_killed_under_load_comes_back_and_nothing_hangs(
    supervised: Machine, record: Callable[..., None]
) -> None:
    assert await outcome(supervised) == "200"
    running = [asyncio.ensure_future(outcome(supervised)) for _ in range(20)]
    await asyncio.sleep(1)
    os.kill(pid_of(supervised, "decode"), signal.SIGKILL)
    killed = time.monotonic()
    ended = await asyncio.gather(*running)
    said = time.monotonic() - killed
    back = ""
    while time.monotonic() - killed < _BACK_SECONDS and back != "200":
        await asyncio.sleep(2)
        back = await outcome(supervised)
    record(
        "decode killed under 20 streams",
        streams={result: ended.count(result) for result in sorted(set(ended))},
        all_ended_after_s=round(said, 1),
        served_again_after_s=round(time.monotonic() - killed, 1),
    )
    assert "hung" not in ended
    assert back == "200"
    assert [await outcome(supervised) for _ in range(3)] == ["200"] * 3
