"""Bursts without any setting: no decode's KV buffer of at least two longest prompts overflows, whoever leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_proxy.connectors import p2p_nccl_loads
from disagg_sim import SimEngine, encode, expected_text
from tests.conftest import running_proxy, soon
from tests.faults.test_kv_burst import PATH, TEXTS, many
from tests.simulated import Machine, text_of, text_of_events

__all__ = ["many"]

LONGEST = 400
PER_TOKEN = 1000
KNOBS = {
    "max_model_len": LONGEST,
    "kv_bytes_per_token": PER_TOKEN,
    "kv_buffer_bytes": 2 * LONGEST * PER_TOKEN,
    "kv_pool_bytes": 1,
}
"""A buffer of exactly two longest prompts, and no pool that takes what is too much."""


@dataclass(frozen=True)
class Ask:
    """One request of a burst; ``leaves_after`` is None where its client stays."""

    prompt: str | list[int]
    tokens: int
    output: int
    streams: bool
    leaves_after: float | None


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    # The KV of a prompt of one token is not loaded, and stays counted.
    tokens, output = draw(st.integers(2, LONGEST - 20)), draw(st.integers(1, 20))
    kind = draw(st.sampled_from(["ids", *TEXTS]))
    prompt: str | list[int] = [5 + draw(st.integers(0, 99))] * tokens
    if kind != "ids":
        each = len(encode(TEXTS[kind]))
        prompt = TEXTS[kind] * -(-tokens // each)
        tokens = len(encode(prompt))
    stays = st.none() | st.floats(0, 0.4)
    return Ask(prompt, tokens, output, draw(st.booleans()), draw(stays))


async def send(machine: Machine, ask: Ask) -> None:
    """Send it; a client that stays gets the right answer."""
    body = {"model": "sim-model", "prompt": ask.prompt, "max_tokens": ask.output, "ignore_eos": True}
    right = expected_text(ask.prompt, ask.output, ignore_eos=True)

    async def whole() -> None:
        if ask.streams:
            assert text_of_events(await machine.stream(PATH, body)) == right
        else:
            status, _, answer = await machine.post(PATH, body)
            assert status == 200 and text_of(answer) == right, answer

    try:
        await asyncio.wait_for(whole(), ask.leaves_after or 30.0)
    except asyncio.TimeoutError:
        assert ask.leaves_after is not None, "no answer"


def used(engines: Sequence[SimEngine]) -> list[int]:
    return [engine.state()["kv_buffer_used"] for engine in engines]


@settings(max_examples=15)
@given(
    burst=st.lists(asks(), min_size=5, max_size=40),
    pairs=st.integers(1, 2),
    batch=st.sampled_from([1, 4, 256]),
)
def test_no_burst_overflows_a_buffer_of_two_longest_prompts(burst: list[Ask], pairs: int, batch: int) -> None:
    async def run() -> None:
        unlimited = aiohttp.TCPConnector(limit=0)
        async with (
            running_proxy() as proxy, aiohttp.ClientSession(connector=unlimited) as http, AsyncExitStack() as stack
        ):  # fmt: skip
            machine = Machine(proxy, stack, http)
            engines = [
                engine
                for _ in range(pairs)
                for engine in await machine.pair(
                    **KNOBS, max_num_seqs=batch, prefill_tokens_per_second=20_000.0, time_per_output_token=0.002
                )
            ]
            await soon(asyncio.gather(*(send(machine, ask) for ask in burst)))
            await machine.unharmed(*engines)
            assert used(engines) == [0] * len(engines)

    asyncio.run(run())


@pytest.mark.interpreted
async def test_the_kv_of_a_long_whole_answer_counts_until_the_engines_counters_show_its_load(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p2p_nccl_loads, "POLL_INTERVAL", 0.02)
    connector: Any = machine.proxy.services.coordinator._connectors["p2p_nccl"]
    connector._loads._timeouts.seconds = 0.05
    _, decode = await machine.pair(time_per_output_token=0.005)
    instance = machine.proxy.instance(decode.http_address)
    body = {"prompt": [7] * 100, "max_tokens": 600, "ignore_eos": True}
    decode.faults.hold("schedule")
    request = asyncio.ensure_future(machine.post(PATH, body))
    while len(decode.received("/metrics")) < 3:
        await asyncio.sleep(0.01)
    assert (instance.kv_waiting, instance.kv_waiting_tokens) == (1, 112)
    decode.faults.release()
    while instance.kv_waiting:
        await asyncio.sleep(0.005)
    assert not request.done() and instance.in_flight == 1 and instance.kv_waiting_tokens == 0
    assert (await soon(request))[0] == 200
    assert not connector._loads._watched and not connector._loads._tasks


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_120_of_160_clients_leave_a_burst_that_is_larger_than_the_buffers(many: Machine, stream: bool) -> None:
    """The handed situation, at a tenth of the size: 160 prompts of 200 tokens, two buffers of 12,000."""
    knobs = {**KNOBS, "max_model_len": 6000, "kv_buffer_bytes": 12_000 * PER_TOKEN}
    prefills, decodes = zip(*[await many.pair(**knobs) for _ in range(2)], strict=True)
    for decode in decodes:
        decode.faults.hold("schedule")
    prompts = [[5 + number] * 200 for number in range(160)]

    async def ask(prompt: list[int]) -> str:
        body = {"prompt": prompt, "max_tokens": 2}
        return text_of_events(await many.stream(PATH, body)) if stream else text_of((await many.post(PATH, body))[2])

    requests = [asyncio.ensure_future(ask(prompt)) for prompt in prompts]
    queue = many.proxy.services.admission_queue
    instances = [many.proxy.instance(decode.http_address) for decode in decodes]
    # Until both decodes hold as many prompts as may wait on them: 28 of 208 tokens in full blocks.
    while [decode.state()["kv_received"] for decode in decodes] != [28 * decodes[0].config.kv_layers] * 2:
        await asyncio.sleep(0.01)
        assert all(decode.state()["listener"] == "alive" for decode in decodes)
    assert queue.waiting == 160 - 2 * 28 and [one.kv_waiting_tokens for one in instances] == [28 * 208] * 2
    for request in requests[:120]:
        request.cancel()
    await soon(asyncio.wait(requests[:120]))
    assert [one.kv_waiting_tokens for one in instances] == [28 * 208] * 2, "decode still holds the KV"
    for decode in decodes:
        decode.faults.release()
    for prompt, request in zip(prompts[120:], requests[120:], strict=True):
        assert await soon(request) == expected_text(prompt, 2)
    await many.unharmed(*prefills, *decodes)
    assert used(decodes) == [0, 0] and [one.kv_waiting_tokens for one in instances] == [0, 0]
