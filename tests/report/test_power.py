"""Energy of a rate, on simulated GPUs."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest

from disagg_power import nvml
from disagg_power.simulated import GpuModel, SimulatedGpus
from disagg_report.power import NoPower, PowerMeter, counted, energy


class Clock:
    """Time moves by 100 ms with each reading of a GPU; ``read`` is set after 30."""

    def __init__(self) -> None:
        self.now, self.count = 100.0, 0
        self.read = threading.Event()

    def __call__(self) -> float:
        self.now += 0.1
        self.count += 1
        if self.count > 60:
            self.read.set()
        return self.now


def machine(watts: list[float], **model: Any) -> tuple[SimulatedGpus, Clock]:
    clock = Clock()
    return SimulatedGpus(models=[GpuModel(idle_w=one, **model) for one in watts], clock=clock), clock


def test_energy_is_the_integral_between_two_times() -> None:
    samples = [(0.0, 100.0), (1.0, 100.0), (2.0, 300.0), (3.0, 300.0)]
    assert energy(samples, 0, 3) == pytest.approx(100 + 200 + 300)
    assert energy(samples, 1.5, 2.5) == pytest.approx((200 + 300) / 2 * 0.5 + 300 * 0.5)
    assert energy(samples, -1, 0) == pytest.approx(100)  # before the first reading: as the first
    assert energy(samples, 3, 5) == pytest.approx(600)
    assert energy([], 0, 1) == 0 and energy(samples, 2, 2) == 0


def test_the_counter_is_read_at_both_ends_and_not_trusted_beyond_or_after_a_restart() -> None:
    samples = [(0.0, 1000.0), (1.0, 1100.0), (2.0, 1400.0)]
    assert counted(samples, 0.5, 2) == pytest.approx(350)
    assert counted(samples, -1, 2) is None and counted(samples, 0, 3) is None and counted([], 0, 1) is None
    assert counted([(0.0, 1000.0), (1.0, 5.0), (2.0, 105.0)], 0, 2) is None


def test_each_role_has_the_sum_of_its_gpus() -> None:
    gpus, clock = machine([400, 250, 50])
    meter = PowerMeter({"prefill": ["0"], "decode": ["1", gpus.find("2").uuid], "none": []}, gpus)
    meter.start()
    assert clock.read.wait(20)
    found = meter.stop()
    assert set(found) == {"prefill", "decode"}
    assert found["prefill"].watts == pytest.approx(400, rel=0.05) and found["decode"].watts == pytest.approx(
        300, rel=0.05
    )
    assert found["decode"].gpus == ("1", gpus.find("2").uuid) and found["decode"].source == "counter"
    assert found["decode"].joules == pytest.approx(found["decode"].watts * found["decode"].seconds)
    assert found["decode"].deviation == pytest.approx(0, abs=0.05)


def test_a_gpu_without_a_counter_has_the_integral_of_its_power() -> None:
    gpus, clock = machine([400], counter=False)
    meter = PowerMeter({"prefill": ["0"]}, gpus)
    meter.start()
    assert clock.read.wait(20)
    found = meter.stop((100.0, 102.5))["prefill"]
    assert found.joules == pytest.approx(1000) and found.source == "integral" and found.deviation is None


def test_a_gpu_that_reports_nothing_and_a_name_that_is_no_gpu() -> None:
    with pytest.raises(NoPower, match="neither its energy nor its power"):
        PowerMeter({"prefill": ["0"]}, machine([400], counter=False, power_reading=False)[0])
    with pytest.raises(NoPower, match="no GPU is named 'MIG-7'"):
        PowerMeter({"prefill": ["MIG-7"]}, machine([400])[0])


def test_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POWER_SIMULATED", raising=False)
    monkeypatch.setattr(nvml, "load", partial(nvml.load, ("no_such_module",)))
    with pytest.raises(NoPower, match="nvidia-ml-py"):
        PowerMeter({"prefill": ["0"]})


def test_a_lost_gpu_has_no_energy() -> None:
    gpus, clock = machine([400])
    meter = PowerMeter({"prefill": ["0"]}, gpus)
    meter.start()
    assert clock.read.wait(20)
    gpus.find("0").set_lost()
    assert meter.stop((100.0, clock.now + 1000))["prefill"].source == "integral", "the counter does not cover it"
