"""Answers of a real pair are those of one real engine, to the token; whatever ends leaves right answers.

The tests run in this order: the last one kills decode and starts it again.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from typing import Any

import aiohttp
import pytest

from tests.kv_real.conftest import HOLD_SECONDS, LOAD_SECONDS, TRANSPORT, Trio, texts

pytestmark = pytest.mark.kv_family("qwen3", "full attention")


async def _external(trio: Trio) -> float:
    return (await trio.decode.tokens_by_source())["external_kv_transfer"]


def _body(prompt: Any, tokens: int = 16, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **more}


@pytest.mark.parametrize("order", ["prefill first", "at once", "decode first"])
@pytest.mark.parametrize("length", [5, 31, 32, 33, 128, 300, 1000])
async def test_the_answer_is_that_of_one_engine(trio: Trio, length: int, order: str) -> None:
    """300 and 1000 tokens are several chunks of prefill."""
    body, before = _body(trio.prompt(length)), await _external(trio)
    _, answer = await trio.both(body, order)
    assert texts(answer) == texts(await trio.plain.post(body))
    assert await _external(trio) - before == length


async def test_corrupted_kv_changes_the_answer(trio: Trio) -> None:
    """Without this, the other tests could pass with KV that is never used."""
    trio.prefill.fault.write_text("corrupt")
    different = 0
    for _ in range(3):
        body = _body(trio.prompt(200), tokens=32)
        _, answer = await trio.both(body)
        different += texts(answer) != texts(await trio.plain.post(body))
    assert different == 3


async def test_a_repeated_prompt_loads_only_what_decode_lacks(trio: Trio) -> None:
    body = _body(trio.prompt(300))
    want, before = texts(await trio.plain.post(body)), await _external(trio)
    for loaded in (300, 300 - 288, 300 - 288):
        _, answer = await trio.both(body)
        assert texts(answer) == want
        assert await _external(trio) - before == loaded
        before += loaded


async def test_a_prompt_that_prefill_has_cached_is_sent_whole(trio: Trio) -> None:
    shared = trio.prompt(320)
    first, second = _body(shared + trio.prompt(50)), _body(shared + trio.prompt(70))
    await trio.prefill.post({**first, "max_tokens": 1})
    before = await _external(trio)
    hits = (await trio.prefill.tokens_by_source())["local_cache_hit"]
    _, answer = await trio.both(second)
    assert texts(answer) == texts(await trio.plain.post(second))
    assert await _external(trio) - before == 390
    assert (await trio.prefill.tokens_by_source())["local_cache_hit"] - hits == 320


async def test_chat(trio: Trio) -> None:
    body = {"messages": [{"role": "user", "content": "Tell me about the sea. " * 8}], "max_tokens": 16}
    before = await _external(trio)
    _, answer = await trio.both(body, path="/v1/chat/completions")
    assert texts(answer) == texts(await trio.plain.post(body, "/v1/chat/completions"))
    assert await _external(trio) > before


@pytest.mark.parametrize("order", ["prefill first", "at once"])
async def test_prompt_logprobs(trio: Trio, order: str) -> None:
    """Decode computes these prompts itself, so that every token has its logprob."""
    body, before = _body(trio.prompt(100), prompt_logprobs=1, logprobs=1), await _external(trio)
    _, answer = await trio.both(body, order, prompt_logprobs=None)
    want = await trio.plain.post(body)
    for got, expected in zip(
        answer["choices"][0]["prompt_logprobs"][1:], want["choices"][0]["prompt_logprobs"][1:], strict=True
    ):
        assert {token: value["logprob"] for token, value in got.items()} == pytest.approx(
            {token: value["logprob"] for token, value in expected.items()}, abs=1e-3
        )
    assert await _external(trio) == before


@pytest.mark.parametrize("order", ["prefill first", "at once", "decode first"])
async def test_a_list_of_prompts(trio: Trio, order: str) -> None:
    lengths = (40, 200, 7, 90)
    body, before = _body([trio.prompt(length) for length in lengths]), await _external(trio)
    _, answer = await trio.both(body, order)
    assert texts(answer) == texts(await trio.plain.post(body))
    assert await _external(trio) - before == sum(lengths)


@pytest.mark.parametrize("on_prefill", [1, 2])
@pytest.mark.parametrize("order", ["prefill first", "at once"])
async def test_two_answers_for_one_prompt(trio: Trio, order: str, on_prefill: int) -> None:
    """The prompt's KV is moved once, whatever n is on either side; seeds make the samples comparable."""
    body, before = _body(trio.prompt(100), n=2, temperature=0.8, seed=11), await _external(trio)
    _, answer = await trio.both(body, order, n=on_prefill)
    assert texts(answer) == texts(await trio.plain.post(body))
    assert await _external(trio) - before == 100


async def test_prompt_list_with_a_duplicate(trio: Trio) -> None:
    prompt = trio.prompt(150)
    body = _body([prompt, trio.prompt(60), prompt])
    _, answer = await trio.both(body, "at once")
    assert texts(answer) == texts(await trio.plain.post(body))


@pytest.mark.parametrize("params", [
    {}, {"transfer_id": 5}, {"transfer_id": "x" * 500, "from": "127.0.0.1:1"}, {"transfer_id": "x", "from": None},
    {"transfer_id": "x", "from": "10.1.1.1:5"}, {"transfer_id": "x", "from": "127.0.0.1:1"},
    {"from": "127.0.0.1:1"}, {"do_remote_prefill": True, "transfer_id": ["x"]},
])  # fmt: skip
async def test_params_that_lead_nowhere_are_simply_computed(trio: Trio, params: dict[str, Any]) -> None:
    body = _body(trio.prompt(60))
    want = texts(await trio.plain.post(body))
    for engine in (trio.decode, trio.prefill):
        start = time.monotonic()
        assert texts(await engine.post({**body, "kv_transfer_params": params})) == want
        assert time.monotonic() - start < LOAD_SECONDS / 2


async def test_prefill_never_asked(trio: Trio) -> None:
    """The request waits for its deadline and is computed; others on decode are not held up meanwhile."""
    body, start = _body(trio.prompt(100)), time.monotonic()
    waiting = asyncio.create_task(trio.decode.post(body, transfer_id="never", from_=trio.prefill.kv_address))
    for _ in range(3):
        await trio.decode.post(_body(trio.prompt(50)))
    assert not waiting.done()
    assert texts(await waiting) == texts(await trio.plain.post(body))
    assert time.monotonic() - start > LOAD_SECONDS - 0.5
    counted = re.search(
        r'^vllm:disagg_kv_recomputed_prompts_total\{.*reason="timeout"\} (\S+)$', await trio.decode.metrics(), re.M
    )
    assert counted is not None and float(counted[1]) == 1
    assert await trio.decode.number("vllm:disagg_kv_loaded_prompts_total") > 20


async def test_prefill_leg_cancelled(trio: Trio) -> None:
    """Decode is told and computes at once."""
    body, start = _body(trio.prompt(1000)), time.monotonic()
    prefill = asyncio.create_task(trio.prefill.post({**body, "max_tokens": 1}, transfer_id="cancelled"))
    decode = asyncio.create_task(trio.decode.post(body, transfer_id="cancelled", from_=trio.prefill.kv_address))
    await asyncio.sleep(0.05)
    prefill.cancel()
    assert texts(await decode) == texts(await trio.plain.post(body))
    assert time.monotonic() - start < LOAD_SECONDS - 1


async def test_many_at_once_with_preemption(trio: Trio) -> None:
    preempted = await trio.decode.number("vllm:num_preemptions_total")
    bodies = [_body(trio.prompt(40 + 7 * number), tokens=200) for number in range(24)]
    answers = await asyncio.gather(*(trio.both(body, "at once") for body in bodies))
    wanted = await asyncio.gather(*(trio.plain.post(body) for body in bodies))
    assert [texts(answer) for _, answer in answers] == [texts(want) for want in wanted]
    assert await trio.decode.number("vllm:num_preemptions_total") > preempted


async def test_prefill_that_preempts(trio: Trio) -> None:
    """Prefill is made to generate too, so that its cache does not hold all. What it computes anew is sent as well."""
    preempted = await trio.prefill.number("vllm:num_preemptions_total")
    bodies = [_body(trio.prompt(60 + 9 * number)) for number in range(24)]
    answers = await asyncio.gather(*(trio.both(body, "at once", max_tokens=160) for body in bodies))
    wanted = await asyncio.gather(*(trio.plain.post(body) for body in bodies))
    assert [texts(answer) for _, answer in answers] == [texts(want) for want in wanted]
    assert await trio.prefill.number("vllm:num_preemptions_total") > preempted


async def test_200_prefills_that_nobody_fetches(trio: Trio) -> None:
    """Prefill keeps a bounded share of its cache for them, then nothing."""
    bodies = [_body(trio.prompt(100), tokens=1) for _ in range(200)]
    await asyncio.gather(*(
        trio.prefill.post(body, transfer_id=f"left-{number}") for number, body in enumerate(bodies)
    ))  # fmt: skip
    await trio.prefill.post(_body(trio.prompt(5), 1))
    assert await trio.prefill.number("vllm:kv_cache_usage_perc") <= 0.55
    _, answer = await trio.both(_body(bodies[0]["prompt"]))
    assert texts(answer) == texts(await trio.plain.post(_body(bodies[0]["prompt"])))
    await asyncio.sleep(HOLD_SECONDS)
    await trio.prefill.post(_body(trio.prompt(5), 1))
    assert await _until_zero(trio, "prefill")


async def test_200_decodes_that_go_away(trio: Trio) -> None:
    tasks = [
        asyncio.create_task(
            trio.decode.post(_body(trio.prompt(100)), transfer_id=f"away-{number}", from_=trio.prefill.kv_address)
        )
        for number in range(200)
    ]
    await asyncio.sleep(2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    body = _body(trio.prompt(700))
    start = time.monotonic()
    _, answer = await trio.both(body)
    assert time.monotonic() - start < LOAD_SECONDS - 1
    assert texts(answer) == texts(await trio.plain.post(body))
    assert await _until_zero(trio, "decode")


async def _until_zero(trio: Trio, which: str) -> bool:
    """An engine writes its figures at the end of a step: a few small requests make it take some."""
    engine = trio.prefill if which == "prefill" else trio.decode
    for _ in range(20):
        await engine.post(_body(trio.prompt(5), 1))
        if await engine.number("vllm:kv_cache_usage_perc") == 0:
            return True
        await asyncio.sleep(0.2)
    return False


async def test_garbage_on_the_kv_ports(trio: Trio) -> None:
    for engine in (trio.prefill, trio.decode):
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\x00\x00\x00\x02\x01{", b""):
            with socket.create_connection(("127.0.0.1", engine.kv_port), timeout=10) as sock:
                sock.sendall(data)
    body, before = _body(trio.prompt(100)), await _external(trio)
    _, answer = await trio.both(body)
    assert texts(answer) == texts(await trio.plain.post(body))
    assert await _external(trio) - before == 100


async def test_the_transport_is_the_one_that_is_tested(trio: Trio) -> None:
    await trio.both(_body(trio.prompt(40)))
    links = re.findall(r"connected to prefill engine \S+ \((\w+)[,;]", trio.decode.log.read_text())
    assert set(links) == {TRANSPORT}


async def test_prefill_killed_during_the_push_and_back(trio: Trio) -> None:
    """Decode uses nothing of it and computes the prompt, and takes KV from the new prefill."""
    trio.prefill.fault.write_text("slow")
    body, before = _body(trio.prompt(100)), await _external(trio)
    decode = asyncio.create_task(trio.decode.post(body, transfer_id="p-dies", from_=trio.prefill.kv_address))
    await trio.prefill.post({**body, "max_tokens": 1}, transfer_id="p-dies")
    await asyncio.sleep(0.3)
    trio.prefill.kill()
    assert texts(await decode) == texts(await trio.plain.post(body))
    assert await _external(trio) == before
    trio.prefill.fault.write_text("")
    trio.prefill.start()
    await trio.prefill.ready()
    body = _body(trio.prompt(300))
    _, answer = await trio.both(body)
    assert texts(answer) == texts(await trio.plain.post(body))
    assert await _external(trio) - before == 300


async def test_decode_killed_during_the_push_and_back(trio: Trio) -> None:
    """Prefill goes on: for others at once, and for the new decode as soon as it is there."""
    trio.prefill.fault.write_text("slow")
    body = _body(trio.prompt(100))
    decode = asyncio.create_task(trio.decode.post(body, transfer_id="d-dies", from_=trio.prefill.kv_address))
    await trio.prefill.post({**body, "max_tokens": 1}, transfer_id="d-dies")
    await asyncio.sleep(0.3)
    trio.decode.kill()
    with pytest.raises(aiohttp.ClientError):
        await decode
    trio.prefill.fault.write_text("")
    start = time.monotonic()
    await trio.prefill.post(_body(trio.prompt(100), 1), transfer_id="alone")
    assert time.monotonic() - start < LOAD_SECONDS / 2
    trio.decode.start()
    await trio.decode.ready()
    body = _body(trio.prompt(300))
    _, answer = await trio.both(body)
    assert texts(answer) == texts(await trio.plain.post(body))
    assert await _external(trio) == 300
