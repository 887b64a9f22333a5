"""Energy of the CPU packages by RAPL (Linux ``powercap``), where this user may read it; often only root may."""

from __future__ import annotations

import time
from pathlib import Path

from disagg_power.report import GpuReport

ROOT = Path("/sys/class/powercap")
_MAX_GAP = 300.0
"""Seconds between two readings in which a counter may wrap at most once: it holds 2**18 J at least on servers."""


class RaplMeter:
    """One CPU package. The counter wraps; what it shows is added up."""

    def __init__(self, folder: Path) -> None:
        self._energy = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = int(self._energy.read_text())
        self._at = time.monotonic()
        self._joules = 0.0
        self._name = (folder / "name").read_text().strip() or folder.name

    def sample(self) -> GpuReport:
        """The package as a report; ``no_figures`` when it cannot be read any more."""
        uuid = f"cpu-{self._name}"
        try:
            value = int(self._energy.read_text())
        except (OSError, ValueError):
            return GpuReport(uuid, name=self._name, state="no_figures")
        now = time.monotonic()
        seconds, moved = now - self._at, value - self._last
        watts = None
        if seconds > 0:
            joules = (moved + self._range if moved < 0 else moved) / 1e6
            if seconds <= _MAX_GAP:
                self._joules += joules
                watts = joules / seconds
        self._last, self._at = value, now
        return GpuReport(uuid, at=now, joules=self._joules, power_w=watts, name=self._name)


def packages(root: Path = ROOT) -> list[RaplMeter]:
    """The CPU packages that can be read; none on other systems, or where only root may."""
    found = []
    for folder in sorted(root.glob("intel-rapl:*")):
        if folder.name.count(":") != 1:
            continue  # a part of a package: cores, memory
        try:
            found.append(RaplMeter(folder))
        except (OSError, ValueError):
            continue
    return found
