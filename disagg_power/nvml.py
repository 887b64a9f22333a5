"""GPUs through NVML (nvidia-ml-py, module ``pynvml``). Reading needs no permission, setting needs root."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from disagg_power.devices import (
    DeviceLost,
    NoLibrary,
    NoPermission,
    NotSupported,
    PowerError,
    PowerLimits,
    Reading,
    find_device,
)

T = TypeVar("T")
MODULES = ("pynvml", "vllm.third_party.pynvml")
"""nvidia-ml-py, or the copy that vLLM brings along."""
_KINDS: dict[int, type[PowerError]] = {
    1: NoLibrary,  # uninitialized
    2: NotSupported,  # invalid argument: a clock or a limit out of range
    3: NotSupported,
    4: NoPermission,
    6: DeviceLost,  # not found
    9: NoLibrary,  # the driver is not loaded
    12: NoLibrary,
    13: NotSupported,  # a function that this driver does not have
    15: DeviceLost,
    16: DeviceLost,  # needs a reset
    28: DeviceLost,  # not found
}
"""``nvmlReturn_t`` of nvml.h."""


def load(modules: Sequence[str] = MODULES) -> Any:
    """The module that speaks to NVML.

    Raises:
        NoLibrary: none of them is installed.
    """
    for name in modules:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise NoLibrary("GPUs cannot be read: nvidia-ml-py is not installed (pip install nvidia-ml-py)")


class NvmlDevices:
    """The GPUs of this machine as NVML has them.

    Args:
        module: in place of what :func:`load` finds.

    Raises:
        NoLibrary: no nvidia-ml-py, or no driver.
    """

    def __init__(self, module: Any = None) -> None:
        self._nvml = load() if module is None else module
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise NoLibrary(f"GPUs cannot be read: {_text(error)}") from None
        self._devices: list[NvmlDevice] | None = None

    def all(self) -> Sequence[NvmlDevice]:
        if self._devices is None:
            nvml = self._nvml
            try:
                self._devices = [NvmlDevice(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
            except nvml.NVMLError as error:
                raise translated(error, "the GPUs") from None
        return self._devices

    def find(self, word: str) -> NvmlDevice:
        found = find_device(self.all(), word)
        assert isinstance(found, NvmlDevice)
        return found

    def close(self) -> None:
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            return


class NvmlDevice:
    """One GPU; see :class:`disagg_power.devices.Device`."""

    simulated = False

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml = nvml
        self._index = index
        try:
            self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
            self._uuid = str(_plain(nvml.nvmlDeviceGetUUID(self._handle)))
            self._name = str(_plain(nvml.nvmlDeviceGetName(self._handle)))
        except nvml.NVMLError as error:
            raise translated(error, f"GPU {index}") from None
        # The first name is that of CUDA 12 and newer, the second goes away with CUDA 14.
        self._reasons = (
            getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
            or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        )
        self._mig = bool(self._optional(lambda: nvml.nvmlDeviceGetMigMode(self._handle)[0]))

    @property
    def index(self) -> int:
        return self._index

    @property
    def uuid(self) -> str:
        return self._uuid

    @property
    def name(self) -> str:
        return self._name

    @property
    def mig(self) -> bool:
        return self._mig

    def read(self) -> Reading:
        nvml, handle, optional = self._nvml, self._handle, self._optional
        milliwatts = optional(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        limit = optional(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        energy = optional(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        at = time.monotonic()
        busy = optional(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        return Reading(
            at=at,
            energy_mj=energy,
            power_w=None if milliwatts is None else milliwatts / 1e3,
            sm_clock_mhz=optional(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            memory_clock_mhz=optional(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            utilization=None if busy is None else busy / 100,
            temperature_c=optional(lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
            throttle=optional(lambda: int(self._reasons(handle))) or 0,
            power_limit_w=None if limit is None else limit / 1e3,
        )

    def supported_sm_clocks(self) -> tuple[int, ...]:
        nvml, handle = self._nvml, self._handle
        memory = self.supported_memory_clocks()[-1]
        clocks = self._do(lambda: nvml.nvmlDeviceGetSupportedGraphicsClocks(handle, memory))
        return tuple(sorted(int(clock) for clock in clocks))

    def supported_memory_clocks(self) -> tuple[int, ...]:
        clocks = self._do(lambda: self._nvml.nvmlDeviceGetSupportedMemoryClocks(self._handle))
        if not clocks:
            raise NotSupported(f"GPU {self._index} lists no memory clocks")
        return tuple(sorted(int(clock) for clock in clocks))

    def power_limits(self) -> PowerLimits:
        nvml, handle = self._nvml, self._handle

        def read() -> PowerLimits:
            lowest, highest = nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)
            default = nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle)
            current = nvml.nvmlDeviceGetPowerManagementLimit(handle)
            return PowerLimits(current / 1e3, default / 1e3, lowest / 1e3, highest / 1e3)

        return self._do(read)

    def lock_sm_clocks(self, lowest: int, highest: int) -> None:
        self._do(lambda: self._nvml.nvmlDeviceSetGpuLockedClocks(self._handle, lowest, highest))

    def reset_sm_clocks(self) -> None:
        self._do(lambda: self._nvml.nvmlDeviceResetGpuLockedClocks(self._handle))

    def lock_memory_clocks(self, lowest: int, highest: int) -> None:
        self._do(lambda: self._nvml.nvmlDeviceSetMemoryLockedClocks(self._handle, lowest, highest))

    def reset_memory_clocks(self) -> None:
        self._do(lambda: self._nvml.nvmlDeviceResetMemoryLockedClocks(self._handle))

    def set_power_limit(self, watts: float) -> None:
        self._do(lambda: self._nvml.nvmlDeviceSetPowerManagementLimit(self._handle, round(watts * 1e3)))

    def _do(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except self._nvml.NVMLError as error:
            raise translated(error, f"GPU {self._index}") from None

    def _optional(self, call: Callable[[], T]) -> T | None:
        """What a GPU may lack is None; a lost GPU is an error."""
        try:
            return self._do(call)
        except DeviceLost:
            raise
        except PowerError:
            return None


def translated(error: Exception, subject: str) -> PowerError:
    """The error of this package for one of NVML."""
    kind = _KINDS.get(getattr(error, "value", 0), PowerError)
    return kind(f"{subject}: {_text(error)}")


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _plain(value: Any) -> Any:
    """Older releases of the module return bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
