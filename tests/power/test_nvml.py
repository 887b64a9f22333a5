"""NVML: its codes become the errors of this package, and what a GPU lacks becomes None."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from disagg_power.devices import (
    POWER_CAP,
    DeviceLost,
    NoLibrary,
    NoPermission,
    NotSupported,
    PowerError,
    PowerLimits,
)
from disagg_power.nvml import NvmlDevices, load


class Error(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"code {value}")
        self.value = value


class FakeNvml:
    """The functions that are used, with answers as of nvidia-ml-py; ``fail`` gives some of them an error."""

    NVMLError = Error
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, **fail: int) -> None:
        self.fail = fail
        self.set: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "nvmlDeviceGetCurrentClocksEventReasons" and self.fail.get(name) == 13:
            raise AttributeError(name)
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            if name in self.fail:
                raise Error(self.fail[name])
            if "Set" in name or "Reset" in name:
                self.set.append((name, *args[1:]))
                return None
            return self.answers(name, args)

        return call

    def answers(self, name: str, args: tuple[Any, ...]) -> Any:
        return {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetUUID": b"GPU-1234",
            "nvmlDeviceGetName": "NVIDIA H200",
            "nvmlDeviceGetMigMode": [0, 0],
            "nvmlDeviceGetPowerUsage": 429_500,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetTotalEnergyConsumption": 123_456,
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=75, memory=10),
            "nvmlDeviceGetClockInfo": {1: 1980, 2: 3201}.get(args[-1] if args else 0),
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetCurrentClocksEventReasons": POWER_CAP,
            "nvmlDeviceGetCurrentClocksThrottleReasons": POWER_CAP,
            "nvmlDeviceGetSupportedMemoryClocks": [3201, 1593],
            "nvmlDeviceGetSupportedGraphicsClocks": [1980, 1965, 345],
            "nvmlDeviceGetPowerManagementLimitConstraints": [200_000, 700_000],
            "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
            "nvmlDeviceGetPowerManagementLimit": 650_000,
        }[name]


def test_a_reading_has_the_units_of_the_interface() -> None:
    nvml = FakeNvml()
    (gpu,) = NvmlDevices(nvml).all()
    reading = gpu.read()
    assert (gpu.index, gpu.uuid, gpu.name, gpu.mig, gpu.simulated) == (0, "GPU-1234", "NVIDIA H200", False, False)
    assert (reading.energy_mj, reading.power_w, reading.power_limit_w) == (123_456, 429.5, 700.0)
    assert (reading.sm_clock_mhz, reading.memory_clock_mhz, reading.utilization) == (1980, 3201, 0.75)
    assert (reading.temperature_c, reading.throttle) == (61.0, POWER_CAP)
    assert gpu.supported_sm_clocks() == (345, 1965, 1980) and gpu.supported_memory_clocks() == (1593, 3201)
    assert gpu.power_limits() == PowerLimits(650, 700, 200, 700)
    assert nvml.set == [], "reading sets nothing"


def test_what_a_gpu_lacks_is_none() -> None:
    missing = {"nvmlDeviceGetTotalEnergyConsumption": 3, "nvmlDeviceGetPowerUsage": 3, "nvmlDeviceGetMigMode": 3}
    (gpu,) = NvmlDevices(FakeNvml(**missing, nvmlDeviceGetCurrentClocksEventReasons=13)).all()
    reading = gpu.read()
    assert reading.energy_mj is None and reading.power_w is None and reading.throttle == POWER_CAP and not gpu.mig


@pytest.mark.parametrize(
    ("code", "kind"),
    [(3, NotSupported), (2, NotSupported), (4, NoPermission), (15, DeviceLost), (16, DeviceLost), (999, PowerError)],
)
def test_codes_become_errors(code: int, kind: type[PowerError]) -> None:
    (gpu,) = NvmlDevices(FakeNvml(nvmlDeviceSetGpuLockedClocks=code)).all()
    with pytest.raises(kind, match=f"GPU 0: code {code}") as caught:
        gpu.lock_sm_clocks(345, 1200)
    assert type(caught.value) is kind


def test_a_lost_gpu_is_an_error_and_not_a_reading_without_figures() -> None:
    (gpu,) = NvmlDevices(FakeNvml(nvmlDeviceGetPowerUsage=15)).all()
    with pytest.raises(DeviceLost):
        gpu.read()


def test_settings_reach_nvml() -> None:
    nvml = FakeNvml()
    (gpu,) = NvmlDevices(nvml).all()
    gpu.lock_sm_clocks(345, 1200)
    gpu.lock_memory_clocks(1593, 1593)
    gpu.set_power_limit(500)
    gpu.reset_sm_clocks()
    gpu.reset_memory_clocks()
    assert nvml.set == [
        ("nvmlDeviceSetGpuLockedClocks", 345, 1200),
        ("nvmlDeviceSetMemoryLockedClocks", 1593, 1593),
        ("nvmlDeviceSetPowerManagementLimit", 500_000),
        ("nvmlDeviceResetGpuLockedClocks",),
        ("nvmlDeviceResetMemoryLockedClocks",),
    ]


def test_without_library_or_driver_there_is_a_reason() -> None:
    with pytest.raises(NoLibrary, match="pip install nvidia-ml-py"):
        load(["no_such_module"])
    with pytest.raises(NoLibrary, match="code 9"):
        NvmlDevices(FakeNvml(nvmlInit=9))
