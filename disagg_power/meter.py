"""Turns readings of one GPU into reports: joules from its counter, or the integral of its power where it has none."""

from __future__ import annotations

from collections.abc import Sequence

from disagg_power.devices import Device, DeviceLost, PowerError, Reading
from disagg_power.report import GpuReport

CHECK_SECONDS = 10.0
"""Shortest time after which counter and integral are compared: the counter moves in steps of 100 ms."""

_MAX_GAP, _MAX_CHECK_GAP = 10.0, 1.0
"""Seconds between two readings beyond which power is not integrated, and integral and counter are not compared: it is
not known what happened in between."""


class GpuMeter:
    """One GPU, read again and again.

    Attributes:
        counted: joules by the counter since the first reading. A counter that restarts (the driver was loaded anew)
            adds what it shows since then; the energy of the gap is not counted rather than guessed.
        integrated: joules as the integral of power since the first reading.
        restarts: how often the counter restarted.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._last: Reading | None = None
        self.counted = self.integrated = 0.0
        self._checked = self._checked_integral = 0.0
        self._seconds = 0.0
        self.restarts = 0

    def sample(self) -> GpuReport:
        """Read the GPU; never raises a :class:`PowerError`."""
        device = self.device
        try:
            reading = device.read()
        except DeviceLost:
            self._last = None
            return self._report(None, "lost")
        except PowerError:
            self._last = None
            return self._report(None, "no_figures")
        self._add(reading)
        self._last = reading
        known = reading.energy_mj is not None or reading.power_w is not None
        return self._report(reading, "ok" if known else "no_figures")

    def _add(self, reading: Reading) -> None:
        last = self._last
        if last is None or reading.at <= last.at:
            return
        seconds = reading.at - last.at
        joules = None
        if reading.power_w is not None and last.power_w is not None and seconds <= _MAX_GAP:
            joules = seconds * (reading.power_w + last.power_w) / 2
            self.integrated += joules
        if reading.energy_mj is None or last.energy_mj is None:
            return
        counted = (reading.energy_mj - last.energy_mj) / 1e3
        if counted < 0:
            self.restarts += 1
            counted, joules = reading.energy_mj / 1e3, None
        self.counted += counted
        if joules is not None and seconds <= _MAX_CHECK_GAP:
            self._checked += counted
            self._checked_integral += joules
            self._seconds += seconds

    @property
    def deviation(self) -> float | None:
        """Of the integral from the counter, 0.05 for 5 % too much; None before 10 s, or where one does not exist."""
        if self._seconds < CHECK_SECONDS or self._checked <= 0:
            return None
        return self._checked_integral / self._checked - 1

    def _known_integral(self, state: str) -> float | None:
        return self.integrated if state == "ok" else None

    def _report(self, reading: Reading | None, state: str) -> GpuReport:
        device = self.device
        if reading is None:
            return GpuReport(
                device.uuid, name=device.name, index=device.index, simulated=device.simulated, mig=device.mig,
                state=state,
            )  # fmt: skip
        counter = reading.energy_mj is not None
        deviation = self.deviation
        return GpuReport(
            device.uuid,
            at=reading.at,
            joules=reading.energy_mj / 1e3 if reading.energy_mj is not None else self._known_integral(state),
            source="counter" if counter else "integral",
            power_w=reading.power_w,
            sm_clock_mhz=reading.sm_clock_mhz,
            memory_clock_mhz=reading.memory_clock_mhz,
            utilization=reading.utilization,
            temperature_c=reading.temperature_c,
            throttle=reading.throttle,
            name=device.name,
            index=device.index,
            simulated=device.simulated,
            mig=device.mig,
            state=state,
            deviation=None if deviation is None else round(deviation, 4),
        )


class Meter:
    """The meters of several GPUs."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self.gpus = [GpuMeter(device) for device in devices]

    def sample(self) -> list[GpuReport]:
        """One report of each GPU."""
        return [gpu.sample() for gpu in self.gpus]
