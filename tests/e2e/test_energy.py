"""Energy through the whole proxy: what simulated GPUs announce, and what the proxy reads itself, is shown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest

from disagg_power.simulated import GpuModel, SimulatedGpus
from disagg_proxy.config import values
from tests.conftest import running_proxy, soon
from tests.ports import hold_port
from tests.simulated import REQUESTS, Machine

PATH = "/v1/completions"


async def energy(machine: Machine) -> dict[str, Any]:
    _, stats = await machine.get("/stats")
    return dict(stats.get("energy") or {})


async def until(machine: Machine, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    async def poll() -> dict[str, Any]:
        while not condition(found := await energy(machine)):
            await asyncio.sleep(0.05)
        return found

    return await soon(poll())


@pytest.mark.parametrize("connector", ["disagg_kv", "p2p_nccl"])
async def test_engines_announce_their_gpus(machine, connector: str) -> None:
    prefill = await machine.engine("prefill", connector=connector, gpu=0)
    decode = await machine.engine("decode", connector=connector, gpu=1)
    found = await until(machine, lambda e: len(e.get("gpus", ())) == 2)
    assert found["simulated"]
    for gpu, engine, role in zip(found["gpus"], (prefill, decode), ("prefill", "decode"), strict=True):
        assert (gpu["instance"], gpu["role"], gpu["state"]) == (engine.http_address, role, "ok")
        assert gpu["name"] == "Simulated H200" and gpu["source"] == "counter" and gpu["watts"] > 0


async def test_a_gpu_that_both_roles_announce_is_shared(machine) -> None:
    prefill, decode = await machine.pair(gpu=0)
    found = await until(machine, lambda e: bool(e.get("gpus") and e["gpus"][0]["shared_with"]))
    # The GPU belongs to the instance that announced it first, which either may be.
    [gpu] = found["gpus"]
    assert {f"{gpu['role']} {gpu['instance']}", *gpu["shared_with"]} == {
        f"prefill {prefill.http_address}",
        f"decode {decode.http_address}",
    }


async def test_a_lost_gpu_is_shown_as_lost(machine) -> None:
    prefill = await machine.engine("prefill", gpu=0)
    await until(machine, lambda e: bool(e.get("gpus")))
    prefill._gpu.gpu.set_lost()
    found = await until(machine, lambda e: e["gpus"][0]["state"] == "lost")
    assert found["gpus"][0]["watts"] is None


async def test_without_gpus_nothing_is_said(machine, pair) -> None:
    await machine.post(PATH, REQUESTS[PATH])
    assert await energy(machine) == {}
    async with machine.http.get(machine.proxy.url + "/metrics") as answer:
        assert "joules" not in await answer.text()


async def test_the_meter_can_be_off(http) -> None:
    async with running_proxy(power_meter=False) as proxy, AsyncExitStack() as stack:
        machine = Machine(proxy, stack, http)
        await machine.pair(gpu=0)
        assert await energy(machine) == {}


async def test_the_proxy_reads_gpus_of_engines_that_do_not_announce_them(tmp_path: Path, http, monkeypatch) -> None:
    file = tmp_path / "gpus.json"
    SimulatedGpus(file, [GpuModel(idle_w=123)] * 2)
    monkeypatch.setenv("POWER_SIMULATED", str(file))
    with ExitStack() as hold:
        port = hold_port(hold, "127.0.0.1")
        gpus = values.engine_gpus(f"127.0.0.1:{port}=1")
        async with running_proxy(power_gpus=gpus) as proxy, AsyncExitStack() as stack:
            machine = Machine(proxy, stack, http)
            await machine.engine("decode", port=port)
            found = await until(machine, lambda e: any(gpu["role"] == "decode" for gpu in e.get("gpus", ())))
            (gpu,) = [gpu for gpu in found["gpus"] if gpu["role"] == "decode"]
            assert (gpu["index"], gpu["watts"], gpu["instance"]) == (1, 123.0, f"127.0.0.1:{port}")
