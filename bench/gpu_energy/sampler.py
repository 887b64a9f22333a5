"""A thread that reads one GPU ten times a second, and what it finds in a window."""

from __future__ import annotations

import itertools
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from typing import Any

from disagg_power.devices import Device, PowerError, Reading, throttle_names

INTERVAL = 0.1


class Forbidden(Exception):
    """Something tried to set a GPU; this run may only read."""


class ReadOnly:
    """The NVML module without what sets or resets; an attempt is remembered, and fails the run."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self.attempts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("nvmlDeviceSet", "nvmlDeviceReset", "nvmlUnitSet", "nvmlSystemSet", "nvmlDeviceClear")):
            self.attempts.append(name)
            raise Forbidden(name)
        return getattr(self._nvml, name)


@dataclass(frozen=True, slots=True)
class Window:
    """What the GPU did between two moments.

    Attributes:
        counter_j, integral_j: energy by the counter, and as the integral of power; None where there is none.
        seconds: between the readings used, as close to the moments as readings are.
    """

    seconds: float
    counter_j: float | None
    integral_j: float | None
    sm_clock_mhz: float | None
    memory_clock_mhz: float | None
    utilization: float | None
    temperature_c: float | None
    throttle: dict[str, float]

    @property
    def joules(self) -> float | None:
        """By the counter where there is one."""
        return self.integral_j if self.counter_j is None else self.counter_j

    @property
    def deviation(self) -> float | None:
        """Of the integral from the counter."""
        if not self.counter_j or self.integral_j is None:
            return None
        return self.integral_j / self.counter_j - 1


class Sampler:
    """Readings from :meth:`start` to :meth:`stop`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.readings: list[Reading] = []
        self.errors: Counter[str] = Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Start reading."""
        self._thread.start()

    def stop(self) -> None:
        """End reading."""
        self._ended.set()
        self._thread.join(2)

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            try:
                self.readings.append(self._device.read())
            except PowerError as error:
                self.errors[str(error)] += 1

    def window(self, begin: float, end: float) -> Window | None:
        """The readings from ``begin`` to ``end`` (``time.monotonic``); None with fewer than two."""
        readings = list(self.readings)
        times = [reading.at for reading in readings]
        found = readings[bisect_left(times, begin) : bisect_right(times, end)]
        if len(found) < 2:
            return None
        first, last = found[0], found[-1]
        counter = integral = None
        if first.energy_mj is not None and last.energy_mj is not None and last.energy_mj >= first.energy_mj:
            counter = (last.energy_mj - first.energy_mj) / 1e3
        watts = [(reading.at, reading.power_w) for reading in found if reading.power_w is not None]
        if len(watts) > 1:
            integral = sum((b - a) * (one + two) / 2 for (a, one), (b, two) in itertools.pairwise(watts))
        reasons = Counter(name for reading in found for name in throttle_names(reading.throttle))
        return Window(
            last.at - first.at,
            counter,
            integral,
            _mean([reading.sm_clock_mhz for reading in found]),
            _mean([reading.memory_clock_mhz for reading in found]),
            _mean([reading.utilization for reading in found]),
            _mean([reading.temperature_c for reading in found]),
            {name: round(count / len(found), 3) for name, count in reasons.items()},
        )

    def counter_between(self, begin: float, end: float) -> tuple[float, float] | None:
        """The lowest and the highest counter in joules from ``begin`` to ``end``."""
        found = [r.energy_mj / 1e3 for r in list(self.readings) if begin <= r.at <= end and r.energy_mj is not None]
        return (min(found), max(found)) if found else None

    def wait(self, count: int, seconds: float) -> bool:
        """Whether ``count`` readings were there within ``seconds``."""
        until = time.monotonic() + seconds
        while len(self.readings) < count and time.monotonic() < until:
            time.sleep(INTERVAL)
        return len(self.readings) >= count


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 3) if known else None
