"""A GPU as the meter reads it and as clocks are set on it: the interface of NVML and of the simulated GPUs.

Units: energy in millijoules (as NVML counts it), power in watts, clocks in MHz (as NVML and ``nvidia-smi`` give them),
temperature in degrees Celsius.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class PowerError(Exception):
    """A GPU cannot be read or set; the text is the reason and names the GPU."""


class NoLibrary(PowerError):
    """There is no NVML: nvidia-ml-py or the driver is missing."""


class NoSuchDevice(PowerError):
    """No GPU has this index or UUID."""


class DeviceLost(PowerError):
    """The GPU has gone away (it fell off the bus, or the driver was reset): nothing works until it is back."""


class NotSupported(PowerError):
    """This GPU, or this MIG instance, does not have what was read or set."""


class NoPermission(PowerError):
    """This user may not change this setting. Locked clocks and power limits need root."""


IDLE, APPLICATION_CLOCKS, POWER_CAP, HARDWARE, SYNC_BOOST = 0x1, 0x2, 0x4, 0x8, 0x10
THERMAL, HARDWARE_THERMAL, POWER_BRAKE, DISPLAY_CLOCKS = 0x20, 0x40, 0x80, 0x100
THROTTLE_NAMES = {
    IDLE: "gpu_idle",
    APPLICATION_CLOCKS: "applications_clocks_setting",
    POWER_CAP: "sw_power_cap",
    HARDWARE: "hw_slowdown",
    SYNC_BOOST: "sync_boost",
    THERMAL: "sw_thermal_slowdown",
    HARDWARE_THERMAL: "hw_thermal_slowdown",
    POWER_BRAKE: "hw_power_brake_slowdown",
    DISPLAY_CLOCKS: "display_clock_setting",
}
"""Bits of ``nvmlDeviceGetCurrentClocksEventReasons`` (nvml.h), named as ``nvidia-smi`` queries them."""
THROTTLED = POWER_CAP | HARDWARE | THERMAL | HARDWARE_THERMAL | POWER_BRAKE
"""Reasons for which a busy GPU runs below the clock it would otherwise have."""


def throttle_names(mask: int) -> tuple[str, ...]:
    """The names of the reasons in ``mask``; bits without a name are left out."""
    return tuple(name for bit, name in THROTTLE_NAMES.items() if mask & bit)


@dataclass(frozen=True, slots=True)
class Reading:
    """One sample of one GPU. None: the GPU does not have this figure.

    Attributes:
        at: ``time.monotonic()`` of the sample (CLOCK_MONOTONIC, the same in all processes of a machine).
        energy_mj: counter of the energy drawn since the driver was loaded; moves about each 100 ms.
        power_w: drawn by the whole board; an average over 1 s on Ampere and newer.
        utilization: share of time with a kernel running, 0 to 1.
        throttle: bits of :data:`THROTTLE_NAMES`; 0 where none or unknown.
    """

    at: float
    energy_mj: int | None = None
    power_w: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    utilization: float | None = None
    temperature_c: float | None = None
    throttle: int = 0
    power_limit_w: float | None = None


@dataclass(frozen=True, slots=True)
class PowerLimits:
    """Power limit of a GPU in watts: what is enforced, the default, and the range that may be set."""

    current_w: float
    default_w: float
    lowest_w: float
    highest_w: float


class Device(Protocol):
    """One GPU. Every method may raise :class:`DeviceLost`.

    Attributes:
        index: as ``nvidia-smi`` numbers it.
        mig: whether MIG is on: counters and clocks are then those of the whole GPU, which several users share.
        simulated: whether it is a model and no hardware.
    """

    @property
    def index(self) -> int: ...
    @property
    def uuid(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def mig(self) -> bool: ...
    @property
    def simulated(self) -> bool: ...

    def read(self) -> Reading:
        """Sample everything. Needs no permission."""
        ...

    def supported_sm_clocks(self) -> tuple[int, ...]:
        """SM clocks that can be locked, ascending.

        Raises:
            NotSupported: the GPU lists none.
        """
        ...

    def supported_memory_clocks(self) -> tuple[int, ...]:
        """Memory clocks that can be locked, ascending.

        Raises:
            NotSupported: the GPU lists none.
        """
        ...

    def power_limits(self) -> PowerLimits:
        """The power limit and its range.

        Raises:
            NotSupported: the GPU has none.
        """
        ...

    def lock_sm_clocks(self, lowest: int, highest: int) -> None:
        """Keep the SM clock between two supported clocks until it is reset, also after this process has ended.

        Raises:
            NoPermission: not root.
            NotSupported: before Volta, or with MIG.
        """
        ...

    def reset_sm_clocks(self) -> None:
        """Back to the default range. Raises as :meth:`lock_sm_clocks`."""
        ...

    def lock_memory_clocks(self, lowest: int, highest: int) -> None:
        """The same for the memory clock; Ampere and newer."""
        ...

    def reset_memory_clocks(self) -> None:
        """Back to the default range. Raises as :meth:`lock_memory_clocks`."""
        ...

    def set_power_limit(self, watts: float) -> None:
        """Set the power limit; ``power_limits().default_w`` is the value to go back to.

        Raises:
            NoPermission: not root.
            NotSupported: outside the range, or no such setting.
        """
        ...


class Devices(Protocol):
    """The GPUs of this machine, from one source."""

    def all(self) -> Sequence[Device]:
        """Every GPU, by index.

        Raises:
            PowerError: they cannot be listed.
        """
        ...

    def find(self, word: str) -> Device:
        """The GPU that ``word`` names: its index as ``nvidia-smi`` numbers it, or the beginning of its UUID.

        Raises:
            NoSuchDevice: none or several have it.
        """
        ...

    def close(self) -> None:
        """Release the library; the devices must not be used afterwards."""
        ...


def find_device(devices: Sequence[Device], word: str) -> Device:
    """:meth:`Devices.find` over a list."""
    found = [
        device for device in devices if word == str(device.index) or (len(word) >= 6 and device.uuid.startswith(word))
    ]
    if len(found) != 1:
        known = " ".join(str(device.index) for device in devices) or "none"
        raise NoSuchDevice(f"{'no' if not found else 'more than one'} GPU is named {word!r} (GPUs here: {known})")
    return found[0]
