"""Energy of GPUs during one rate: by their counters, or the integral of their power where a GPU has no counter.

Read ten times a second, as the counter moves every 100 ms. The host (CPUs, memory, fans) is not included.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence

from disagg_power.devices import Device, Devices, PowerError, Reading
from disagg_power.gpus import open_devices
from disagg_report.records import Power

INTERVAL = 0.1


class NoPower(Exception):
    """Power cannot be measured; the text is the reason."""


def energy(samples: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Joules from ``begin`` to ``end`` of sorted samples (time, watts); the first and the last one extend outwards."""
    if not samples or end <= begin:
        return 0.0
    times = [begin, *(moment for moment, _ in samples if begin < moment < end), end]
    watts = [_at(samples, moment) for moment in times]
    return sum(
        (b - a) * (one + two) / 2
        for a, b, one, two in zip(times, times[1:], watts, watts[1:], strict=False)
    )  # fmt: skip


def counted(samples: Sequence[tuple[float, float]], begin: float, end: float) -> float | None:
    """Joules from ``begin`` to ``end`` by the counter's readings (time, joules).

    Returns:
        None where the readings do not cover the window, or the counter restarted within it.
    """
    inside = [value for moment, value in samples if begin <= moment <= end]
    if not samples or samples[0][0] > begin or samples[-1][0] < end or inside != sorted(inside):
        return None
    return _at(samples, end) - _at(samples, begin)


def _at(samples: Sequence[tuple[float, float]], moment: float) -> float:
    before = samples[0]
    for sample in samples:
        if sample[0] >= moment:
            if sample[0] == before[0] or moment <= before[0]:
                return sample[1] if sample[0] == moment else before[1]
            part = (moment - before[0]) / (sample[0] - before[0])
            return before[1] + part * (sample[1] - before[1])
        before = sample
    return before[1]


class PowerMeter:
    """Reads each role's GPUs from :meth:`start` to :meth:`stop`, in a thread.

    Args:
        roles: GPUs by role: indices as in ``nvidia-smi``, or UUIDs.
        devices: the GPUs of this machine; None opens them.

    Raises:
        NoPower: no nvidia-ml-py, no driver, or a GPU that reports neither energy nor power.
    """

    def __init__(self, roles: Mapping[str, Sequence[str]], devices: Devices | None = None) -> None:
        self._roles = {role: tuple(names) for role, names in roles.items() if names}
        self._devices: dict[str, Device] = {}
        try:
            found = open_devices(os.environ) if devices is None else devices
            for name in {name for names in self._roles.values() for name in names}:
                self._devices[name] = device = found.find(name)
                reading = device.read()
                if reading.energy_mj is None and reading.power_w is None:
                    raise NoPower(f"GPU {name} reports neither its energy nor its power")
        except PowerError as error:
            raise NoPower(str(error)) from None
        self._readings: dict[str, list[Reading]] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Discard previous readings and start."""
        self._readings = {name: [] for name in self._devices}
        self._ended.clear()
        self._read()
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)
        self._thread.start()

    def stop(self, window: tuple[float, float] | None = None) -> dict[str, Power]:
        """Stop, and return the energy of each role within ``window`` (``time.monotonic``), or since the start."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._read()
        first = max((readings[0].at for readings in self._readings.values() if readings), default=0.0)
        last = min((readings[-1].at for readings in self._readings.values() if readings), default=0.0)
        begin, end = window or (first, last)
        if end <= begin:
            return {}
        powers = {role: self._power(names, begin, end) for role, names in self._roles.items()}
        return {role: power for role, power in powers.items() if power is not None}

    def _power(self, names: tuple[str, ...], begin: float, end: float) -> Power | None:
        """The energy of some GPUs; None where one has no reading."""
        joules, source = 0.0, "counter"
        by_counter = by_integral = 0.0
        for name in names:
            readings = self._readings[name]
            energies = [(one.at, one.energy_mj / 1e3) for one in readings if one.energy_mj is not None]
            watts = [(one.at, one.power_w) for one in readings if one.power_w is not None]
            found = counted(energies, begin, end)
            integral = energy(watts, begin, end) if watts else None
            if found is None:
                if integral is None:
                    return None
                found, source = integral, "integral"
            elif integral is not None:
                by_counter, by_integral = by_counter + found, by_integral + integral
            joules += found
        deviation = by_integral / by_counter - 1 if by_counter else None
        return Power(names, joules / (end - begin), joules, end - begin, source, deviation)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            due = max(due + INTERVAL, time.monotonic())
            self._read()

    def _read(self) -> None:
        for name, device in self._devices.items():
            try:
                self._readings[name].append(device.read())
            except PowerError:
                continue
