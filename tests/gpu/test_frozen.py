"""Stalled engines on real GPUs: KV that never comes, with and without a prefill that can be replayed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import AsyncIterator, Callable, Iterator

import aiohttp
import pytest
from aiohttp import web

from tests.gpu.conftest import ROOT, SERVED, Machine, free_port
from tests.gpu.test_supervision import outcome, pid_of
from tests.gpu.test_two_gpus import COMPLETIONS, SENTENCE, healthy, post

Record = Callable[..., None]
_FREEZE_AFTER = 5
_BACK_SECONDS = 200
_CASES = 4


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The machine under the script's supervision, with a short deadline for stalled engines."""
    settings = {
        "PREFILL_KV_PORT": "21601",
        "DECODE_KV_PORT": "22601",
        "FREEZE_AFTER_MIN": str(_FREEZE_AFTER),
        "FREEZE_AFTER_MAX": str(_FREEZE_AFTER),
    }
    found = Machine(tmp_path_factory.mktemp("watched"), settings)
    try:
        found.script("all", "--supervise")
        yield found
    finally:
        found.script("stop")


class LossyPrefill:
    """Passes everything on to a prefill, but for requests that it answers 200 by itself, so that no KV is sent."""

    def __init__(self, prefill: str) -> None:
        self._prefill = prefill
        self.lose = 0

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        if self.lose and request.method == "POST":
            self.lose -= 1
            choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length"}
            usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
            return web.json_response({"id": "x", "object": "text_completion", "choices": [choice], "usage": usage})
        headers = {name: request.headers[name] for name in ("X-Request-Id", "Content-Type") if name in request.headers}
        async with (
            aiohttp.ClientSession() as http,
            http.request(request.method, self._prefill + request.path, data=body, headers=headers) as answer,
        ):
            kind = answer.headers.get("Content-Type", "application/json")
            return web.Response(status=answer.status, body=await answer.read(), headers={"Content-Type": kind})


@pytest.fixture
async def lossy(watched: Machine) -> AsyncIterator[tuple[LossyPrefill, str]]:
    """A prefill that loses KV, and the URL of a second proxy over it and the machine's decode."""
    kv = {i["role"]: i["kv_address"] for i in watched.stats()["instances"]}
    prefill, port = LossyPrefill(watched.prefill), free_port()
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", prefill.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    where = runner.addresses[0]
    command = [
        sys.executable, str(ROOT / "disagg_prefill_proxy_server.py"), "--http-host", "127.0.0.1",
        "--http-port", str(port), "--zmq-host", "127.0.0.1", "--zmq-port", str(free_port()),
        "--prefill", f"http://127.0.0.1:{where[1]},{kv['prefill']}", "--decode", f"{watched.decode},{kv['decode']}",
        "--freeze-after-min", "3", "--freeze-after-max", "3",
    ]  # fmt: skip
    proxy = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                await asyncio.to_thread(watched.get, url + "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                await asyncio.sleep(0.1)
        yield prefill, url
    finally:
        proxy.terminate()
        proxy.wait(40)
        await runner.cleanup()


async def test_a_decode_that_waits_for_kv_which_never_comes_is_freed_without_a_restart(
    watched: Machine, lossy: tuple[LossyPrefill, str], record: Record
) -> None:
    prefill, url = lossy
    ask = {"prompt": SENTENCE * 20, "max_tokens": 16, "temperature": 0}
    status, _ = await post(url, COMPLETIONS, ask)
    assert status == 200
    took = []
    for _ in range(_CASES):
        other = asyncio.ensure_future(
            post(watched.proxy, COMPLETIONS, {"prompt": SENTENCE, "max_tokens": 300, "ignore_eos": True})
        )
        prefill.lose = 1
        begun = time.monotonic()
        status, answer = await post(url, COMPLETIONS, ask, timeout=60)
        took.append(round(time.monotonic() - begun, 2))
        assert status == 200 and answer["usage"]["completion_tokens"] == 16
        assert (await other)[0] == 200, "a request beside it went on"
    decode = next(i for i in json.loads(watched.get(url + "/stats"))["instances"] if i["role"] == "decode")
    record(
        f"decode waited for KV that never came, {_CASES} times, freed by a replayed prefill",
        seconds=took, freezes=decode["freezes"], replays=decode["replays"],
    )  # fmt: skip
    assert decode["freezes"] == _CASES and decode["state"] == "ready"
    await healthy(watched)


async def until_served(machine: Machine, since: float) -> float:
    """Seconds after ``since`` at which three requests in a row are answered."""
    good = 0
    while time.monotonic() - since < _BACK_SECONDS and good < 3:
        good = good + 1 if await outcome(machine, 20) == "200" else 0
        if not good:
            await asyncio.sleep(1)
    assert good == 3, machine.stats()["instances"]
    return round(time.monotonic() - since, 1)


async def test_a_decode_that_nothing_frees_is_restarted_by_the_supervision(watched: Machine, record: Record) -> None:
    kv = {i["role"]: i["kv_address"] for i in watched.stats()["instances"]}
    foreign = f"___prefill_addr_{kv['prefill']}___decode_addr_{kv['decode']}_{'0' * 32}"

    async def ask_for_kv_that_nobody_has() -> None:
        body = {"model": SERVED, "prompt": SENTENCE, "max_tokens": 4}
        timeout = aiohttp.ClientTimeout(total=_BACK_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            try:
                async with http.post(watched.decode + COMPLETIONS, json=body, headers={"X-Request-Id": foreign}) as got:
                    await got.read()
            except aiohttp.ClientError:
                return

    stuck = asyncio.ensure_future(ask_for_kv_that_nobody_has())
    await asyncio.sleep(1)
    begun = time.monotonic()
    ended = await asyncio.gather(*(outcome(watched, 60) for _ in range(10)))
    told = round(time.monotonic() - begun, 1)
    served = await until_served(watched, begun)
    await asyncio.gather(stuck, return_exceptions=True)
    record(
        "decode waits for KV that nobody has, 10 requests behind it",
        outcomes={result: ended.count(result) for result in sorted(set(ended))},
        all_told_after_s=told,
        served_again_after_s=served,
    )
    assert "hung" not in ended and ended.count("504") == 10


async def test_a_prefill_killed_while_it_sends(watched: Machine, record: Record) -> None:
    def prompt(i: int) -> list[int]:
        return [i + 10] + [10 + (i + j) % 4000 for j in range(7999)]

    async def ask(i: int) -> str:
        try:
            return str((await post(watched.proxy, COMPLETIONS, {"prompt": prompt(i), "max_tokens": 8}, timeout=90))[0])
        except asyncio.TimeoutError:
            return "hung"
        except aiohttp.ClientError:
            return "cut"

    await healthy(watched)
    before = {name: pid_of(watched, name) for name in ("prefill", "decode")}
    running = [asyncio.ensure_future(ask(i)) for i in range(20)]
    await asyncio.sleep(0.7)
    os.killpg(before["prefill"], signal.SIGKILL)
    begun = time.monotonic()
    ended = await asyncio.gather(*running)
    told = round(time.monotonic() - begun, 1)
    served = await until_served(watched, begun)
    record(
        "prefill killed while it sends, 20 prompts of 8,000 tokens under way",
        outcomes={result: ended.count(result) for result in sorted(set(ended))},
        all_told_after_s=told,
        served_again_after_s=served,
        decode_restarted=pid_of(watched, "decode") != before["decode"],
    )
    assert "hung" not in ended
