"""A burst of texts against a limit that is exactly decode's buffer, whatever the prompts before it were like."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from disagg_sim import SimEngine, encode, expected_text
from tests.conftest import soon
from tests.faults.conftest import in_turn
from tests.simulated import Machine, text_of_events

PATH = "/v1/completions"
PER_TOKEN = 1000
LENGTH = 2000
FIT = 15
BURST = 40
BUFFER = FIT * LENGTH * PER_TOKEN
"""Bytes of KV on each decode."""

EXACTLY = pytest.mark.settings(**in_turn.kwargs, kv_buffer_bytes=BUFFER, kv_bytes_per_token=PER_TOKEN)
KNOBS = {"kv_bytes_per_token": PER_TOKEN, "kv_buffer_bytes": BUFFER, "kv_pool_bytes": 1}

SPARSE = " people people"
"""Seven bytes a token. (The KV of a prompt of one token is not loaded, and stays counted.)"""

# Bytes and tokens of each, to be repeated.
TEXTS = {"words": " between the", "marks": " people;{", "bytes": "0x", "another script": " 数据"}


async def full(machine: Machine, decodes: list[SimEngine], requests: int) -> None:
    """Until the requests that have room are prefilled and counted at their true size, and the others wait."""
    instances = [machine.proxy.instance(decode.http_address) for decode in decodes]
    received = [decode.state()["kv_received"] for decode in decodes]
    steady = 0
    while steady < 2:
        await asyncio.sleep(0.01)
        states = [decode.state() for decode in decodes]
        assert all(state["listener"] == "alive" for state in states), "more KV than the buffer holds"
        counts = [instance.in_flight for instance in instances]
        arrived = [(state["kv_received"] - before) // 4 for state, before in zip(states, received, strict=True)]
        counted = [instance.kv_waiting_tokens // LENGTH for instance in instances]
        everybody = machine.proxy.services.admission_queue.waiting + sum(counts) == requests
        steady = steady + 1 if everybody and counts == arrived == counted else 0


@pytest.fixture
async def many(machine: Machine) -> AsyncIterator[Machine]:
    """The same, for more requests than a client has connections by default."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as machine.http:
        yield machine


@EXACTLY
@pytest.mark.parametrize("kind", TEXTS)
async def test_a_burst_after_a_sparse_prompt_stays_within_the_buffer(many: Machine, kind: str) -> None:
    prefills, decodes = zip(*[await many.pair(**KNOBS) for _ in range(2)], strict=True)
    for _ in range(2):
        assert (await many.post(PATH, {"prompt": SPARSE, "max_tokens": 1}))[0] == 200
    tokens = len(encode(TEXTS[kind]))
    prompts = [f"{number:03d}" + TEXTS[kind] * ((LENGTH - 3) // tokens) for number in range(BURST)]
    assert {len(encode(prompt)) for prompt in prompts} <= set(range(LENGTH - 8, LENGTH + 1))
    for decode in decodes:
        decode.faults.hold("schedule")
    requests = [asyncio.ensure_future(many.stream(PATH, {"prompt": prompt, "max_tokens": 2})) for prompt in prompts]
    await soon(full(many, decodes, BURST))
    # The buffers are used: room is kept only for the next prompt, whose length shows when it is prefilled.
    unused = (max(len(json.dumps(prompt)) for prompt in prompts) + LENGTH) * PER_TOKEN
    assert all(BUFFER - unused <= decode.state()["kv_buffer_used"] <= BUFFER for decode in decodes)
    for decode in decodes:
        decode.faults.release()
    for prompt, request in zip(prompts, requests, strict=True):
        assert text_of_events(await soon(request)) == expected_text(prompt, 2)
    await many.unharmed(*prefills, *decodes)
