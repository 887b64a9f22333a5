"""Models and adapters that engines have loaded since their last probe."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disagg_sim import SimEngine
from tests.conftest import soon
from tests.simulated import REQUESTS, Machine, check_error

PATH = "/v1/completions"
ADAPTER = {**REQUESTS[PATH], "model": "adapter"}

pytestmark = pytest.mark.settings(probe_interval=60.0)


def load(*engines: SimEngine) -> None:
    for engine in engines:
        object.__setattr__(engine.config, "models", (*engine.config.models, "adapter"))


def probes(*engines: SimEngine) -> list[int]:
    return [len(engine.received("/v1/models")) for engine in engines]


@pytest.mark.parametrize("path", REQUESTS)
async def test_an_adapter_is_served_at_once(machine: Machine, pair, path: str) -> None:
    load(*pair)
    assert (await soon(machine.send(path, {**REQUESTS[path], "model": "adapter"})))[0] == 200
    await machine.unharmed(*pair)


async def test_an_adapter_that_only_one_probe_has_seen_is_served_at_once(machine: Machine, pair) -> None:
    load(*pair)
    prober = machine.proxy.services.discovery._prober
    assert prober is not None
    await prober.probe(machine.proxy.instance(pair[0].http_address))
    assert (await soon(machine.send(PATH, ADAPTER)))[0] == 200


@pytest.mark.parametrize("path", ["/tokenize", "/v1/models/adapter"])
async def test_routes_of_one_engine_know_it_too(machine: Machine, pair, path: str) -> None:
    load(*pair)
    if path == "/tokenize":
        assert (await machine.post(path, {"model": "adapter", "prompt": "x"}))[0] == 200
    else:
        assert (await machine.get(path))[0] == 200


async def test_a_name_that_does_not_exist_is_looked_for_once_a_second(machine: Machine, pair) -> None:
    before = probes(*pair)
    unknown: dict[str, Any] = {**ADAPTER, "model": "no such"}
    answers = await soon(asyncio.gather(*(machine.send(PATH, unknown) for _ in range(20))))
    answers += [await soon(machine.send(PATH, unknown))]
    for answer in answers:
        check_error(*answer, 404, "model_not_found")
    assert all(now - then <= 3 for now, then in zip(probes(*pair), before, strict=True)), "within three seconds"
    assert probes(*pair) > before
    await machine.unharmed(*pair)
