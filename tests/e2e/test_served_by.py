"""SERVED_BY_HEADER=1: answers of generation requests name the engines of their last attempt."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulated import REQUESTS

PATH = "/v1/completions"
ASK = REQUESTS[PATH]


def engines(*named: tuple[str, Any]) -> str:
    return ", ".join(f"{role}={engine.http_address}" for role, engine in named)


@pytest.mark.settings(served_by_header=True)
@pytest.mark.parametrize("chunked", [False, True], ids=["direct", "quart"])
@pytest.mark.parametrize("path", REQUESTS)
async def test_answers_name_their_engines(machine, pair, dial, path: str, chunked: bool) -> None:
    prefill, decode = pair
    wire = await dial(machine.proxy.url)
    wire.chunked = chunked
    both = engines(("prefill", prefill), ("decode", decode))
    for stream in (False, True):
        wire.post(path, {**REQUESTS[path], "stream": stream})
        status, headers, _ = await wire.answer()
        assert (status, headers.getall("X-Served-By")) == (200, [both])
    for failing in (422, 502):
        prefill.faults.fail_next(failing, b"{}", path=path)
        wire.post(path, REQUESTS[path])
        status, headers, _ = await wire.answer()
        assert (status, headers.getall("X-Served-By")) == (failing, [both])
    wire.post(path, {"model": "other"})
    assert "X-Served-By" not in (await wire.answer())[1], "no engine has seen it"


@pytest.mark.settings(served_by_header=True)
async def test_a_decode_that_serves_alone_is_named_alone(machine) -> None:
    decode = await machine.engine("decode", connector="disagg_kv")
    await machine.proxy.until(lambda: bool(machine.proxy.services.registry.models()))
    status, headers, _ = await machine.post(PATH, ASK)
    assert (status, headers["X-Served-By"]) == (200, engines(("decode", decode)))


async def test_engines_are_not_named_by_default(machine, pair) -> None:
    for body in (ASK, {**ASK, "stream": True}):
        _, headers, _ = await machine.send(PATH, body)
        assert "X-Served-By" not in headers
