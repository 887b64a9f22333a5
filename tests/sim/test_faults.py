"""The controls for tests do what they say, and only to the request they are meant for."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from disagg_sim import expected_text

from .pair import COMPLETIONS, Pair

ONE = {"prompt": [42], "max_tokens": 30}
RIGHT = expected_text([42], 30)


async def text(pair: Pair) -> str:
    return str((await pair.post(pair.d, COMPLETIONS, ONE)).json["choices"][0]["text"])


async def test_fail_next(pair: Pair) -> None:
    pair.d.faults.fail_next(429, "slow down", {"Retry-After": "7"}, path=COMPLETIONS, times=2)
    assert (await pair.get(pair.d, "/health")).status == 200
    for _ in range(2):
        answer = await pair.post(pair.d, COMPLETIONS, ONE)
        assert (answer.status, answer.text, answer.headers["Retry-After"]) == (429, "slow down", "7")
    assert await text(pair) == RIGHT


@pytest.mark.parametrize("trick", ["reset_next", "close_next"])
async def test_no_answer(pair: Pair, trick: str) -> None:
    getattr(pair.d.faults, trick)(path=COMPLETIONS)
    with pytest.raises((aiohttp.ServerDisconnectedError, ConnectionResetError, aiohttp.ClientOSError)):
        await pair.post(pair.d, COMPLETIONS, ONE)
    assert len(pair.d.received(COMPLETIONS)) == 1
    assert await text(pair) == RIGHT


async def test_hang_next(pair: Pair) -> None:
    pair.d.faults.hang_next(path=COMPLETIONS)
    hanging = asyncio.create_task(pair.post(pair.d, COMPLETIONS, ONE))
    await pair.d.wait_until(lambda s: s["http_requests"] == 1)
    assert await text(pair) == RIGHT
    assert not hanging.done()
    hanging.cancel()


async def read_stream(pair: Pair) -> tuple[bytes, list[bytes]]:
    pieces: list[bytes] = []
    try:
        url = f"http://{pair.d.http_address}{COMPLETIONS}"
        async with pair.http.post(url, json={**ONE, "stream": True}) as response:
            assert response.status == 200
            async for piece, _ in response.content.iter_chunks():
                pieces.append(piece)
    except (aiohttp.ClientPayloadError, aiohttp.ClientOSError, ConnectionResetError):
        return b"".join(pieces), pieces
    return b"".join(pieces), pieces


@pytest.mark.parametrize("tokens", [0, 1, 5])
async def test_cut_stream_after(pair: Pair, tokens: int) -> None:
    pair.d.faults.hold("schedule", after=tokens)
    pair.d.faults.cut_stream_after(tokens)
    data, _ = await read_stream(pair)
    assert data.count(b"data: ") <= tokens
    assert b"[DONE]" not in data
    pair.d.faults.release()
    state = await pair.d.wait_until(lambda s: s["running"] == 0 and s["waiting"] == 0 and s["aborting"] == 0)
    assert state["finished"] == 0
    assert (await read_stream(pair))[0].endswith(b"data: [DONE]\n\n")


async def test_split_writes(pair: Pair) -> None:
    whole, _ = await read_stream(pair)
    pair.d.faults.split_writes([1, 7, 2])
    data, pieces = await read_stream(pair)
    created = b'"created":'
    assert data.count(b"data: ") == whole.count(b"data: ") and data.count(created) == whole.count(created)
    assert max(map(len, pieces)) <= 7
    assert await text(pair) == RIGHT
    pair.d.faults.split_writes([])
    assert max(map(len, (await read_stream(pair))[1])) > 7


async def test_refuse_and_accept_connections(pair: Pair) -> None:
    assert await text(pair) == RIGHT
    pair.d.faults.refuse_connections()
    assert await text(pair) == RIGHT, "the pooled connection stays"
    async with aiohttp.ClientSession() as fresh:
        with pytest.raises(aiohttp.ClientConnectorError):
            await fresh.get(f"http://{pair.d.http_address}/health")
        pair.d.faults.accept_connections()
        await pair.d.wait_until(lambda s: s["accepting"])
        async with fresh.get(f"http://{pair.d.http_address}/health") as response:
            assert response.status == 200


async def test_health_status(pair: Pair) -> None:
    pair.d.faults.health_status = 503
    assert (await pair.get(pair.d, "/health")).status == 503
    pair.d.faults.health_status = None
    assert (await pair.get(pair.d, "/health")).status == 200


@pytest.mark.parametrize("point", ["schedule", "forward", "answer"])
async def test_hold_and_step(pair: Pair, point: Any) -> None:
    faults = pair.d.faults
    faults.hold(point)
    answer = asyncio.create_task(pair.post(pair.d, COMPLETIONS, {**ONE, "max_tokens": 4}))
    for steps in range(4):
        state = await pair.d.wait_until(lambda s, n=steps: s["held_at"] == point and s["steps"] == n)
        assert state["running"] == (0 if point == "schedule" and steps == 0 else 1)
        faults.step(point)
    assert (await answer).status == 200
    faults.release()


async def test_kill_resets_everything_and_the_same_ports_serve_again(pair: Pair) -> None:
    pair.d.faults.hold("schedule", after=2)
    reading = asyncio.create_task(read_stream(pair))
    await pair.d.wait_until(lambda s: s["held_at"] == "schedule")
    await pair.d.kill()
    data, _ = await reading
    assert b"[DONE]" not in data
    with pytest.raises(aiohttp.ClientConnectorError):
        await pair.get(pair.d, "/health")
    old = pair.d
    pair.d = old.restarted()
    await pair.d.start()
    assert (pair.d.http_address, pair.d.kv_address) == (old.http_address, old.kv_address)
    assert await text(pair) == RIGHT
