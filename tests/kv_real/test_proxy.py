"""The real proxy in front of two real engines with the project's own connector: what a client sees."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from disagg_proxy.cluster.choice import Way
from disagg_proxy.cluster.instance import State
from tests.conftest import Proxy, running_proxy
from tests.kv_real.conftest import Trio, texts
from tests.kv_real.engines import MODEL, PYTHON
from tests.placed import dictate

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Where is San Francisco?"}]
_ANNOUNCED = 20.0
"""Seconds; engines announce themselves every 3."""


@pytest.fixture
async def proxy(trio: Trio) -> AsyncIterator[Proxy]:
    async with running_proxy(zmq_port=trio.proxy_port, prefill_timeout=60.0, decode_timeout=60.0) as found:
        await asyncio.wait_for(found.until_pairs(), _ANNOUNCED)
        yield found


async def ask(proxy: Proxy, path: str, body: dict[str, Any], **headers: str) -> tuple[int, Any, Any]:
    message = {"model": "tiny", "temperature": 0, "ignore_eos": True, **body}
    async with (
        aiohttp.ClientSession() as http,
        http.post(proxy.url + path, json=message, headers=headers) as answer,
    ):
        raw = await answer.read()
        streamed = answer.headers["Content-Type"].startswith("text/event-stream")
        return answer.status, answer.headers, raw if streamed else json.loads(raw)


async def external(trio: Trio) -> float:
    return (await trio.decode.tokens_by_source()).get("external_kv_transfer", 0.0)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/score", "/rerank", "/classify"])
async def test_what_the_model_cannot_do_harms_nobody(trio, proxy, path: str) -> None:
    """The engine says so, and generates on."""
    status, _, answer = await ask(proxy, path, {"input": "x", "query": "x", "documents": ["y"], "text_1": "x"})
    assert status in (400, 404), answer
    assert (await ask(proxy, COMPLETIONS, {"prompt": trio.prompt(40), "max_tokens": 3}))[0] == 200


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_responses(trio, proxy, stream: bool, alone: bool) -> None:
    """The prompt is new each time, so that decode's own cache has nothing of it."""
    before = await external(trio)
    text = (
        f"{stream} {alone}: where is San Francisco, and how far is it from there to Los Angeles by train and on foot?"
    )
    body = {"input": text, "max_output_tokens": 8, "stream": stream, "truncation": "auto" if alone else "disabled"}
    status, _, answer = await ask(proxy, "/v1/responses", body)
    assert status == 200, answer
    if stream:
        events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: ")]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["type"] in ("response.completed", "response.incomplete")
        answer = events[-1]["response"]
    usage = answer["usage"]
    assert usage["output_tokens"] == 8 and usage["input_tokens_details"]["cached_tokens"] < usage["input_tokens"] - 1
    message = {"model": "tiny", "temperature": 0, "ignore_eos": True, **body, "stream": False}
    assert _said(await trio.plain.post(message, "/v1/responses")) == _said(answer)
    loaded = await external(trio) - before
    assert loaded == 0 if alone else loaded >= usage["input_tokens"] - 32


def _said(answer: Any) -> list[str]:
    return [part["text"] for item in answer["output"] for part in item.get("content") or ()]


@pytest.mark.parametrize("length", [3, 32, 33, 100, 300, 700])
async def test_the_answer_is_that_of_one_engine_and_the_kv_came_from_prefill(trio, proxy, length: int) -> None:
    body = {"prompt": trio.prompt(length), "max_tokens": 12, "ignore_eos": True}
    before = await external(trio)
    status, _, answer = await ask(proxy, COMPLETIONS, body)
    assert status == 200
    assert texts(answer) == texts(await trio.plain.post(body))
    assert await external(trio) - before >= length - 1 or length < 33
    assert answer["usage"]["prompt_tokens"] == length


@pytest.mark.parametrize("stream", [False, True])
async def test_the_tokens_are_the_same_whichever_way(trio, proxy, stream: bool) -> None:
    """A prefill serves alone, with the KV of other prompts held for decode, and goes on to prefill for it."""
    for way in (*Way, Way.SPLIT):
        dictate(proxy, way)
        body = {"prompt": trio.prompt(300), "max_tokens": 24, "ignore_eos": True}
        want, before = texts(await trio.plain.post(body)), await external(trio)
        status, _, answer = await ask(proxy, COMPLETIONS, {**body, "stream": stream})
        assert status == 200, answer
        if stream:
            events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: {")]
            assert ["".join(event["choices"][0]["text"] for event in events)] == want
        else:
            assert texts(answer) == want
        assert bool(await external(trio) - before) is (way is Way.SPLIT)
    ways = proxy.services.stats.ways
    assert ways == {Way.SPLIT.value: 2, Way.DECODE_ALONE.value: 1, Way.PREFILL_ALONE.value: 1}


async def test_chat_streams_lists_and_choices(trio, proxy) -> None:
    chat = {"messages": HELLO, "max_tokens": 10, "ignore_eos": True}
    status, _, answer = await ask(proxy, CHAT, chat)
    assert status == 200 and texts(answer) == texts(await trio.plain.post(chat, CHAT))
    prompts = [trio.prompt(70), trio.prompt(40)]
    status, _, answer = await ask(proxy, COMPLETIONS, {"prompt": prompts, "max_tokens": 8})
    assert texts(answer) == texts(await trio.plain.post({"prompt": prompts, "max_tokens": 8, "ignore_eos": True}))
    body = {"prompt": trio.prompt(90), "max_tokens": 9, "ignore_eos": True}
    status, _, raw = await ask(proxy, COMPLETIONS, {**body, "stream": True})
    events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: {")]
    assert ["".join(e["choices"][0]["text"] for e in events)] == texts(await trio.plain.post(body))
    status, _, answer = await ask(
        proxy, COMPLETIONS, {"prompt": trio.prompt(50), "n": 2, "temperature": 0.8, "seed": 3, "max_tokens": 6}
    )
    assert status == 200 and len(answer["choices"]) == 2


async def test_the_clients_own_request_id_comes_back_and_nothing_internal(trio, proxy) -> None:
    status, headers, answer = await ask(
        proxy, COMPLETIONS, {"prompt": trio.prompt(40), "max_tokens": 3}, **{"X-Request-Id": "mine-1"}
    )
    assert status == 200 and headers["X-Request-Id"] == "mine-1"
    assert answer["id"].startswith("cmpl-mine-1") and not answer.get("kv_transfer_params")


async def test_prompt_logprobs_are_right(trio, proxy) -> None:
    body = {"prompt": trio.prompt(40), "max_tokens": 3, "prompt_logprobs": 1, "ignore_eos": True}
    status, _, answer = await ask(proxy, COMPLETIONS, body)
    assert status == 200
    want = (await trio.plain.post(body))["choices"][0]["prompt_logprobs"]
    got = answer["choices"][0]["prompt_logprobs"]
    assert [sorted(e or {}) for e in got] == [sorted(e or {}) for e in want]


async def test_a_refusal_is_the_engines_own(trio, proxy) -> None:
    status, _, answer = await ask(proxy, COMPLETIONS, {"prompt": trio.prompt(9), "max_tokens": 5000})
    assert status == 400 and "max_tokens=5000" in answer["error"]["message"]


async def test_clients_that_leave_leave_nothing(trio, proxy) -> None:
    async def leave(i: int) -> None:
        body = {"prompt": trio.prompt(400), "max_tokens": 200}
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ask(proxy, COMPLETIONS, body), 0.02 * (i % 40))

    await asyncio.gather(*(leave(i) for i in range(200)))
    body = {"prompt": trio.prompt(100), "max_tokens": 6, "ignore_eos": True}
    status, _, answer = await ask(proxy, COMPLETIONS, body)
    assert status == 200 and texts(answer) == texts(await trio.plain.post(body))
    stats = proxy.services
    for _ in range(100):
        if not any(i.in_flight for i in stats.registry.instances()) and not len(stats.background):
            break
        await asyncio.sleep(0.1)
    assert [i.in_flight for i in stats.registry.instances()] == [0, 0]
    assert stats.stats.kv_releases.started == 0


async def test_vllm_bench_serve(trio, proxy) -> None:
    before = await external(trio)
    host, port = proxy.url.removeprefix("http://").split(":")
    bench = await asyncio.create_subprocess_exec(
        str(PYTHON), "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--host", host, "--port", port,
        "--model", "tiny", "--tokenizer", str(MODEL), "--temperature", "0", "--dataset-name", "random",
        "--random-input-len", "40", "--random-output-len", "6", "--num-prompts", "40",
        # With more at once than decode takes, prefill gives up the newest KV: right, but not what is meant.
        "--max-concurrency", "8",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await bench.communicate()
    assert bench.returncode == 0, out.decode()[-3000:]
    assert re.search(r"Successful requests:\s+40", out.decode()), out.decode()[-3000:]
    assert not re.search(r"Failed requests:\s+[1-9]", out.decode()), out.decode()[-3000:]
    # A random prompt of 40 tokens is a few less when its text is read again, and on a busy machine decode computes some
    # whose KV is late.
    assert await external(trio) - before > 40 * 20, "the KV came from prefill"


async def test_without_prefill_decode_serves_alone_and_prefill_is_taken_back(trio, proxy) -> None:
    body = {"prompt": trio.prompt(300), "max_tokens": 40, "ignore_eos": True}
    want = texts(await trio.plain.post(body))
    running = [asyncio.ensure_future(ask(proxy, COMPLETIONS, {**body, "prompt": body["prompt"]})) for _ in range(3)]
    await asyncio.sleep(0.2)
    trio.prefill.kill()
    for status, _, answer in await asyncio.gather(*running):
        assert status == 200 and texts(answer) == want, "decode computes what prefill did not send"
    status, _, answer = await ask(proxy, COMPLETIONS, body)
    assert status == 200 and texts(answer) == want
    async with aiohttp.ClientSession() as http, http.get(proxy.url + "/health") as health:
        report = await health.json()
        assert health.status == 200 and (report["pairs"], report["decodes_that_serve_alone"]) == (0, 1)
    trio.prefill.start()
    await trio.prefill.ready()
    address = f"127.0.0.1:{trio.prefill.port}"
    await asyncio.wait_for(proxy.until_state(address, State.READY), 30)
    before = await external(trio)
    body = {"prompt": trio.prompt(200), "max_tokens": 6, "ignore_eos": True}
    status, _, answer = await ask(proxy, COMPLETIONS, body)
    assert status == 200 and texts(answer) == texts(await trio.plain.post(body))
    assert await external(trio) - before >= 199
