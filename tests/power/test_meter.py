"""The meter: joules by the counter or by the integral, and a state where neither is right."""

from __future__ import annotations

import pytest

from disagg_power.meter import GpuMeter
from disagg_power.simulated import GpuModel, SimulatedGpu, SimulatedGpus
from tests.power.test_simulated import Clock


def metered(clock: Clock, **model: object) -> tuple[SimulatedGpu, GpuMeter]:
    gpu = SimulatedGpus(models=[GpuModel(idle_w=100, dynamic_w=400, **model)], clock=clock).find("0")  # type: ignore[arg-type]
    return gpu, GpuMeter(gpu)


def run(clock: Clock, meter: GpuMeter, seconds: float) -> None:
    for _ in range(round(seconds * 10)):
        clock.now += 0.1
        meter.sample()


def test_counter_and_integral_agree() -> None:
    clock = Clock()
    gpu, meter = metered(clock)
    meter.sample()
    run(clock, meter, 5)
    assert meter.deviation is None, "too short to tell"
    gpu.set_load(1.0)
    run(clock, meter, 10)
    report = meter.sample()
    assert report.source == "counter" and report.joules == pytest.approx(5 * 100 + 10 * 500, rel=0.01)
    assert meter.counted == pytest.approx(5500, rel=0.01) and meter.integrated == pytest.approx(5500, rel=0.01)
    assert report.deviation is not None and abs(report.deviation) < 0.01


def test_without_a_counter_power_is_integrated() -> None:
    clock = Clock()
    _, meter = metered(clock, counter=False)
    meter.sample()
    run(clock, meter, 10)
    report = meter.sample()
    assert report.source == "integral" and report.joules == pytest.approx(1000) and report.deviation is None


def test_without_either_there_are_no_figures() -> None:
    report = metered(Clock(), counter=False, power_reading=False)[1].sample()
    assert (report.state, report.joules, report.power_w) == ("no_figures", None, None)


def test_a_counter_that_restarts_adds_what_it_shows_since() -> None:
    clock = Clock()
    gpu, meter = metered(clock)
    meter.sample()
    run(clock, meter, 10)
    gpu.restart_counter()
    run(clock, meter, 10)
    assert meter.restarts == 1 and meter.counted == pytest.approx(2000, rel=0.01)


def test_a_lost_gpu_is_lost_and_comes_back_without_a_jump() -> None:
    clock = Clock()
    gpu, meter = metered(clock)
    meter.sample()
    run(clock, meter, 1)
    gpu.set_lost()
    assert meter.sample().state == "lost" and meter.sample().joules is None
    clock.now += 100
    gpu.set_lost(False)
    before = meter.counted
    assert meter.sample().state == "ok" and meter.counted == before
