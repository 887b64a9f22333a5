"""What the connector announces of its GPUs is what the proxy reads, and nothing of it can harm the engine."""

from __future__ import annotations

import threading
from typing import Any

from disagg_kv.engine.energy import EnergyReader, GpuReader, Unseen
from disagg_power.nvml import NvmlDevice
from disagg_power.report import unpacked
from tests.power.test_nvml import FakeNvml


class Nvml(FakeNvml):
    def answers(self, name: str, args: tuple[Any, ...]) -> Any:
        more = {"nvmlDeviceGetHandleByUUID": "handle", "nvmlDeviceGetIndex": 0}
        return more[name] if name in more else super().answers(name, args)


def test_the_proxy_reads_what_the_connector_writes() -> None:
    nvml = Nvml()
    (report,) = unpacked([GpuReader(nvml, "GPU-1234").read()])
    own = NvmlDevice(nvml, 0).read()
    assert (report.uuid, report.name, report.index, report.state) == ("GPU-1234", "NVIDIA H200", 0, "ok")
    assert report.joules == own.energy_mj / 1e3 and report.source == "counter"  # type: ignore[operator]
    assert (report.power_w, report.sm_clock_mhz, report.memory_clock_mhz) == (429.5, 1980, 3201)
    assert (report.utilization, report.temperature_c, report.throttle) == (0.75, 61.0, own.throttle)
    assert nvml.set == []


def test_a_gpu_without_a_counter_integrates_its_power() -> None:
    gpu = GpuReader(Nvml(nvmlDeviceGetTotalEnergyConsumption=3), "GPU-1234")
    gpu.read()
    (report,) = unpacked([gpu.read()])
    assert report.source == "integral" and report.joules is not None and not gpu.counts


def test_a_lost_gpu_a_mig_instance_and_one_that_is_not_seen_have_states() -> None:
    lost = GpuReader(Nvml(nvmlDeviceGetPowerUsage=15), "GPU-1234").read()
    bare = GpuReader(Nvml(nvmlDeviceGetTotalEnergyConsumption=3, nvmlDeviceGetPowerUsage=3), "MIG-1").read()
    states = [(report.state, report.mig) for report in unpacked([lost, bare, Unseen("GPU-1", 1).read()])]
    assert states == [("lost", False), ("no_figures", True), ("no_figures", False)]


def test_a_driver_that_fails_or_hangs_announces_nothing() -> None:
    def broken() -> list[GpuReader]:
        raise ModuleNotFoundError("vllm.third_party.pynvml")

    failed = EnergyReader(broken)
    failed._thread.join(30)
    assert failed.reports() == []
    released = threading.Event()

    def hanging() -> list[GpuReader]:
        released.wait(30)
        return []

    hung = EnergyReader(hanging)
    assert hung.reports() == []
    released.set()
    hung.close()
