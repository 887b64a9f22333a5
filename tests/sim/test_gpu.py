"""The simulated GPU of an engine: steps are its load, its clock is their pace, and its energy is the model's."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg_power.simulated import SimulatedGpus
from disagg_sim.gpu import DECODE_LOAD, EngineGpu


def test_steps_take_longer_at_a_lower_clock(tmp_path: Path) -> None:
    path = str(tmp_path / "gpus.json")
    gpu = EngineGpu(path, 0)
    assert gpu.step(1.0, 0.5) == 1.5
    SimulatedGpus(path).find("0").lock_sm_clocks(345, 990)
    gpu._read_pace()
    assert gpu.step(1.0, 0.0) == pytest.approx(2.0)
    assert gpu.step(0.0, 1.0) == pytest.approx(1200 / 990)
    SimulatedGpus(path).find("0").lock_sm_clocks(345, 1500)
    gpu._read_pace()
    assert gpu.step(0.0, 1.0) == 1.0, "above the knee decode is no faster"


def test_work_becomes_load() -> None:
    gpu = EngineGpu("", 0)
    gpu.step(0.15, 0.05)
    seen = []
    for _ in range(3):
        gpu._spend(0.1)
        reading = gpu.gpu.read()
        seen.append((reading.utilization, reading.power_w))
    model = gpu.gpu.model
    mixed = model.idle_w + model.dynamic_w * (1 + DECODE_LOAD) / 2
    assert seen == [(1.0, 650.0), (1.0, pytest.approx(mixed)), (0.0, 90.0)]


async def test_the_load_ends_with_the_engine(tmp_path: Path) -> None:
    path = str(tmp_path / "gpus.json")
    gpu = EngineGpu(path, 2)
    gpu.start()
    gpu._set(1.0, 1.0)
    assert SimulatedGpus(path).find("2").read().utilization == 1.0
    await gpu.stop()
    assert SimulatedGpus(path).find("2").read().utilization == 0.0
