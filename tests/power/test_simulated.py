"""Simulated GPUs: power, clocks and the energy counter follow the model, whoever of several processes changes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from disagg_power.devices import (
    APPLICATION_CLOCKS,
    IDLE,
    POWER_CAP,
    DeviceLost,
    NoPermission,
    NoSuchDevice,
    NotSupported,
    PowerError,
    throttle_names,
)
from disagg_power.simulated import GpuModel, SimulatedGpus, best_clock

MODEL = GpuModel(
    idle_w=100, dynamic_w=400, exponent=2.0, lowest_mhz=300, highest_mhz=1500, step_mhz=100, limit_w=600, knee_mhz=900
)


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def gpus(model: GpuModel = MODEL, clock: Clock | None = None) -> SimulatedGpus:
    return SimulatedGpus(models=[model, model], clock=clock or Clock())


def test_an_idle_gpu_sleeps_and_a_busy_one_runs_at_its_highest_clock() -> None:
    gpu = gpus().find("0")
    idle = gpu.read()
    assert (idle.power_w, idle.sm_clock_mhz, idle.utilization, idle.throttle) == (100, 300, 0, IDLE)
    gpu.set_load(0.5)
    busy = gpu.read()
    assert (busy.power_w, busy.sm_clock_mhz, busy.utilization, busy.throttle) == (300, 1500, 1.0, 0)


def test_the_counter_moves_in_steps_of_100_ms_and_is_the_integral_of_power() -> None:
    clock = Clock()
    gpu = gpus(clock=clock).find("1")
    clock.now += 0.05
    gpu.set_load(1.0)
    assert gpu.read().energy_mj == 0
    clock.now += 0.06
    assert gpu.read().energy_mj == 100 * 50 + 500 * 50
    clock.now += 0.08
    assert gpu.read().energy_mj == 100 * 50 + 500 * 50
    clock.now = 60.0
    gpu.set_load(0)
    clock.now = 70.0
    joules = (0.05 * 100) + (9.95 * 500) + (10 * 100)
    assert gpu.read().energy_mj == pytest.approx(joules * 1e3, abs=1)


def test_a_counter_restarts() -> None:
    clock = Clock()
    gpu = gpus(clock=clock).find("0")
    clock.now += 10
    before = gpu.read().energy_mj
    gpu.restart_counter()
    after = gpu.read().energy_mj
    assert (before, after) == (1_000_000, 0)
    clock.now += 1
    assert gpu.read().energy_mj == 100_000


def test_a_lock_caps_the_clock_and_its_lower_end_pins_an_idle_gpu() -> None:
    gpu = gpus().find("0")
    gpu.lock_sm_clocks(300, 950)
    assert gpu.sm_lock() == (300, 900) and gpu.read().sm_clock_mhz == 300
    gpu.set_load(1.0)
    reading = gpu.read()
    assert reading.sm_clock_mhz == 900 and reading.throttle == APPLICATION_CLOCKS
    assert reading.power_w == pytest.approx(100 + 400 * (900 / 1500) ** 2)
    assert gpu.pace("prefill") == pytest.approx(900 / 1500) and gpu.pace("decode") == 1.0
    gpu.set_load(0)
    gpu.lock_sm_clocks(900, 900)
    assert gpu.read().sm_clock_mhz == 900
    gpu.reset_sm_clocks()
    assert gpu.sm_lock() is None and gpu.read().sm_clock_mhz == 300


def test_a_power_limit_pushes_the_clock_down() -> None:
    gpu = gpus().find("0")
    gpu.set_load(1.0)
    gpu.set_power_limit(300)
    reading = gpu.read()
    assert reading.power_w is not None and reading.power_w <= 300
    assert reading.sm_clock_mhz == 1000 and throttle_names(reading.throttle) == ("sw_power_cap",)
    assert reading.throttle == POWER_CAP and gpu.power_limits().current_w == 300
    with pytest.raises(NotSupported, match="out of range"):
        gpu.set_power_limit(100)


def test_what_may_not_be_set_is_not_set() -> None:
    all_gpus = gpus()
    first, second = all_gpus.all()
    first.set_settable(False)
    with pytest.raises(NoPermission, match="GPU 0: Insufficient Permissions"):
        first.lock_sm_clocks(300, 900)
    second.lock_sm_clocks(300, 900)
    second.set_lost()
    for call in (second.read, second.reset_sm_clocks, second.supported_sm_clocks):
        with pytest.raises(DeviceLost):
            call()
    second.set_lost(False)
    assert first.sm_lock() is None and second.sm_lock() == (300, 900)
    with pytest.raises(NoSuchDevice, match=r"GPUs here: 0 1"):
        all_gpus.find("7")
    assert all_gpus.find(second.uuid) is second


def test_figures_that_a_gpu_does_not_have_are_none() -> None:
    reading = gpus(GpuModel(counter=False, power_reading=False)).find("0").read()
    assert reading.energy_mj is None and reading.power_w is None


def test_processes_share_gpus_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "gpus.json"
    mine = SimulatedGpus(path, [MODEL])
    other = SimulatedGpus(path, privileged=False)
    with pytest.raises(NoPermission):
        other.find("0").lock_sm_clocks(300, 900)
    mine.find("0").lock_sm_clocks(300, 900)
    assert other.find("0").sm_lock() == (300, 900) and other.changes == 2
    program = (
        "import os; from disagg_power.simulated import SimulatedGpus as S;"
        f"S({str(path)!r}).find('0').set_load(1.0, 'engine', os.getpid());"
        f"print(S({str(path)!r}).find('0').read().utilization)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1.0"
    assert mine.find("0").read().utilization == 0, "the load ended with its process"


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PowerError, match="cannot be read from"):
        SimulatedGpus(tmp_path / "none.json")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_best_clock_is_inside_the_range_and_neighbours_cost_more(phase: str) -> None:
    assert phase in ("prefill", "decode")
    clocks = MODEL.clocks()
    best = best_clock(MODEL, phase)  # type: ignore[arg-type]
    cost = [MODEL.power(clock, 1) / MODEL.pace(clock, phase) for clock in clocks]  # type: ignore[arg-type]
    at = clocks.index(best)
    assert 0 < at < len(clocks) - 1 and cost[at] < cost[at - 1] and cost[at] < cost[at + 1]
