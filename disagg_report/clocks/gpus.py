"""Energy, heat and throttling of each role's GPUs during a run, through disagg_power's devices."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from disagg_power.devices import THROTTLED, Devices, Reading, throttle_names
from disagg_report.clocks.runs import RoleEnergy
from disagg_report.power import energy

OFTEN = 0.1
"""Share of the samples above which a throttle reason counts."""


class GpuWatch:
    """Samples of every GPU of the roles.

    Args:
        roles: GPUs by role.

    Raises:
        PowerError: a GPU cannot be found or read.
    """

    def __init__(self, devices: Devices, roles: Mapping[str, Sequence[str]]) -> None:
        self._roles = {role: [devices.find(word) for word in words] for role, words in roles.items()}
        self._samples: dict[str, list[Reading]] = {}
        self.begin()

    def begin(self) -> None:
        """Discard earlier samples, and take the first one."""
        self._samples = {device.uuid: [] for devices in self._roles.values() for device in devices}
        self.sample()

    def sample(self) -> None:
        """One reading of every GPU. Raises PowerError."""
        for devices in self._roles.values():
            for device in devices:
                self._samples[device.uuid].append(device.read())

    def end(self) -> dict[str, RoleEnergy]:
        """By role, since :meth:`begin`."""
        self.sample()
        return {
            role: together([measured(self._samples[device.uuid]) for device in devices])
            for role, devices in self._roles.items()
        }


def measured(samples: Sequence[Reading]) -> RoleEnergy:
    """One GPU, from at least two samples in order. A counter that restarts is no counter: then it is the integral."""
    first, last = samples[0], samples[-1]
    counters = [one.energy_mj for one in samples if one.energy_mj is not None]
    counted = len(counters) == len(samples) and all(b >= a for a, b in itertools.pairwise(counters))
    if counted and first.energy_mj is not None and last.energy_mj is not None:
        joules = (last.energy_mj - first.energy_mj) / 1e3
    else:
        powers = [(one.at, one.power_w) for one in samples if one.power_w is not None]
        joules, counted = energy(powers, first.at, last.at), False
    heat = [one.temperature_c for one in samples if one.temperature_c is not None]
    reasons = Counter(name for one in samples for name in throttle_names(one.throttle & THROTTLED))
    often = tuple(sorted(name for name, count in reasons.items() if count > OFTEN * len(samples)))
    return RoleEnergy(joules, counted, max(heat, default=None), often)


def together(gpus: Sequence[RoleEnergy]) -> RoleEnergy:
    """Several GPUs of one role."""
    heat = [one.hottest_c for one in gpus if one.hottest_c is not None]
    reasons = sorted({reason for one in gpus for reason in one.throttled})
    return RoleEnergy(
        sum(one.joules for one in gpus), all(one.counted for one in gpus), max(heat, default=None), tuple(reasons)
    )
