"""Clients that leave during long prefills: this proxy, and then vLLM's example proxy on the same engines.

EXAMPLE_PROXY names vLLM's ``disagg_proxy_p2p_nccl_xpyd.py`` (vLLM's repository, examples/); it listens on 10001 and
30001. The engines are no good for anything afterwards, so they are this module's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator

import aiohttp
import msgpack
import pytest
import zmq

from tests.gpu.conftest import Machine, free_port
from tests.gpu.test_two_gpus import COMPLETIONS, SENTENCE, post

EXAMPLE = os.environ.get("EXAMPLE_PROXY", "")
CLIENTS = 100
_APART = 0.15
"""Seconds; an H200 prefills and sends 8,000 tokens of a 4B model in 0.16."""
URL = "http://127.0.0.1:10001"

pytestmark = pytest.mark.skipif(not EXAMPLE, reason="EXAMPLE_PROXY is not set")


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine of this test's own, away from the example's ports."""
    settings = {"PREFILL_KV_PORT": "21701", "DECODE_KV_PORT": "22701", "PROXY_PORT": str(free_port())}
    found = Machine(tmp_path_factory.mktemp("own"), settings)
    try:
        found.script("all", "--no-supervise")
        yield found
    finally:
        found.script("stop")


async def all_leave(url: str) -> None:
    """One client after another asks for 8,000 tokens, and leaves while they are prefilled, sent, or decoded."""
    dice = random.Random(1)

    async def leave(i: int) -> None:
        body = {"prompt": [i + 10] + [10 + (i + j) % 4000 for j in range(7999)], "max_tokens": 50}
        with contextlib.suppress(asyncio.TimeoutError, aiohttp.ClientError):
            await post(url, COMPLETIONS, body, timeout=dice.uniform(0.1, 0.5))

    clients = []
    for i in range(CLIENTS):
        clients.append(asyncio.ensure_future(leave(i)))
        await asyncio.sleep(_APART)
    await asyncio.gather(*clients)


async def answered(url: str, count: int = 10) -> int:
    """How many of some plain requests are answered within 40 s."""

    async def ask() -> bool:
        try:
            body = {"prompt": SENTENCE, "max_tokens": 4}
            return (await post(url, COMPLETIONS, body, timeout=40))[0] == 200
        except (asyncio.TimeoutError, aiohttp.ClientError):
            return False

    return sum(await asyncio.gather(*(ask() for _ in range(count))))


async def test_a_hundred_clients_that_leave(own: Machine, record: Callable[..., None]) -> None:
    here: dict[str, int] = {"before": await answered(own.proxy)}
    await all_leave(own.proxy)
    here["after"] = await answered(own.proxy)
    for _ in range(120):
        if not own.stats()["requests"]["in_background"]:
            break
        await asyncio.sleep(0.5)
    here["later"] = await answered(own.proxy)
    instances = {i["role"]: i for i in own.stats()["instances"]}
    example = subprocess.Popen([sys.executable, EXAMPLE])
    try:
        there = await through_example(instances)
    finally:
        example.kill()
        example.wait()
    health = {role: own.get(getattr(own, role) + "/health") == "" for role in ("prefill", "decode")}
    record(f"{CLIENTS} clients leave; of 10 plain requests answered", here=here, example=there, health_says_200=health)
    assert here == {"before": 10, "after": 10, "later": 10}


async def through_example(instances: dict[str, dict]) -> dict[str, int]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect("tcp://127.0.0.1:30001")
        for role, kind in (("prefill", "P"), ("decode", "D")):
            addresses = {name: instances[role][name] for name in ("http_address",)}
            socket.send(msgpack.packb({"type": kind, **addresses, "zmq_address": instances[role]["kv_address"]}))
        for _ in range(50):
            if await answered(URL, 1):
                break
            await asyncio.sleep(0.2)
    there = {"before": await answered(URL)}
    await all_leave(URL)
    there["after"] = await answered(URL)
    await asyncio.sleep(10)
    there["later"] = await answered(URL)
    return there
