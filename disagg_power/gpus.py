"""Which GPUs there are: those of NVML, or simulated ones in a file."""

from __future__ import annotations

from collections.abc import Mapping

from disagg_power.devices import Devices
from disagg_power.nvml import NvmlDevices
from disagg_power.simulated import SimulatedGpus

SIMULATED = "POWER_SIMULATED"
"""Environment: the file of simulated GPUs that take the place of NVML's."""
PRIVILEGED = "POWER_SIMULATED_PRIVILEGED"
"""Environment: 1 where this process may set clocks of simulated GPUs, as root may those of real ones."""


def open_devices(environ: Mapping[str, str]) -> Devices:
    """The GPUs of this machine.

    Raises:
        PowerError: no NVML, or the file of simulated GPUs cannot be read.
    """
    path = environ.get(SIMULATED, "")
    if path:
        return SimulatedGpus(path, privileged=environ.get(PRIVILEGED, "") == "1")
    return NvmlDevices()
