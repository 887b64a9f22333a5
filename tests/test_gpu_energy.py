"""The check of the meter on a GPU: rehearsed on simulated engines, and made to fail."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_energy import __main__ as command
from bench.gpu_energy.load import Engine, totals
from bench.gpu_energy.sampler import Forbidden, ReadOnly, Sampler
from disagg_power.devices import Reading
from disagg_power.nvml import NvmlDevices
from tests.conftest import running_proxy
from tests.power.test_nvml import FakeNvml
from tests.simulated import Machine


async def test_a_short_run_on_simulated_engines(tmp_path: Path, http, monkeypatch) -> None:
    file, out = tmp_path / "gpus.json", tmp_path / "out.jsonl"
    monkeypatch.setenv("POWER_SIMULATED", str(file))
    for name, seconds in (("_WARM_SECONDS", 0.3), ("_LEAST_SECONDS", 1.0), ("_LOOK_SECONDS", 0.4)):
        monkeypatch.setattr(command, name, seconds)
    async with running_proxy() as proxy, AsyncExitStack() as stack:
        machine = Machine(proxy, stack, http)
        engine = await machine.engine(
            "decode", connector="disagg_kv", gpu=0, gpus_file=str(file), prefill_tokens_per_second=20000.0,
            time_per_output_token=0.01,
        )  # fmt: skip
        words = ["--engine", f"http://{engine.http_address}", "--proxy", proxy.url, "--limit", "12", "--out", str(out)]
        words += ["--prompt", "200", "--output", "20", "--prefill-at-once", "2", "--decode-at-once", "4"]
        await asyncio.to_thread(command.main, words)
    lines = {line["step"]: line for line in map(json.loads, out.read_text().splitlines())}
    # A slow host may leave steps too little time; what the run says of itself is checked all the same.
    assert lines["verdict"]["ok"] is not bool(lines["verdict"]["failed"])
    if any("left_out" in line for line in lines.values()):
        pytest.skip("this host is too slow for the limit")
    assert set(lines) == {"about", "idle_before", "prefill", "idle_between", "decode", "verdict"}
    assert lines["about"]["simulated"] and lines["idle_before"]["watts"] < lines["prefill"]["watts"]
    for step, counted in (("prefill", "prompt_tokens"), ("decode", "output_tokens")):
        assert lines[step][counted] > 0 and lines[step]["mj_per_token"] > 0
        assert set(lines[step]["statuses"]) == {"200"} and lines[step]["announced"] > 0


def test_an_engine_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POWER_SIMULATED", str(tmp_path / "none.json"))
    assert command.main(["--engine", "http://127.0.0.1:9"]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["step"] == "verdict" and not last["ok"] and "none.json" in last["failed"][0]


def test_whatever_sets_something_is_stopped_and_remembered() -> None:
    nvml = ReadOnly(FakeNvml())
    (gpu,) = NvmlDevices(nvml).all()
    assert gpu.read().energy_mj == 123_456 and nvml.attempts == []
    for call in (lambda: gpu.lock_sm_clocks(345, 1200), gpu.reset_sm_clocks, lambda: gpu.set_power_limit(300)):
        with pytest.raises(Forbidden):
            call()
    assert nvml.attempts == [
        "nvmlDeviceSetGpuLockedClocks", "nvmlDeviceResetGpuLockedClocks", "nvmlDeviceSetPowerManagementLimit"
    ]  # fmt: skip


def test_a_window_compares_counter_and_integral() -> None:
    sampler = Sampler(NvmlDevices(FakeNvml()).all()[0])
    for second in range(11):
        sampler.readings.append(Reading(float(second), energy_mj=100_000 * second, power_w=110.0, throttle=4))
    window = sampler.window(0, 10)
    assert window is not None and window.counter_j == 1000 and window.integral_j == 1100
    assert window.deviation == pytest.approx(0.1) and window.throttle == {"sw_power_cap": 1.0}
    assert sampler.counter_between(2, 4) == (200.0, 400.0) and sampler.window(20, 30) is None


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ('vllm:prompt_tokens_total{engine="0"} 50.0\n', 50),
        ('vllm:prompt_tokens_total{a="b"} 50.0\nvllm:prompt_tokens_by_source_total{source="local_compute"} 7.0\n'
         'vllm:prompt_tokens_by_source_total{source="local_cache_hit"} 43.0\n', 7),
    ],
)  # fmt: skip
def test_tokens_are_those_that_the_engine_computed(text: str, prompt: int) -> None:
    found: Any = totals(text + "# HELP x\nvllm:generation_tokens_total 3.0\nvllm:request_success_total 2.0\n")
    assert (found.prompt, found.output, found.requests) == (prompt, 3, 2)
    with pytest.raises(ValueError, match="must be http"):
        Engine("localhost:8000")
