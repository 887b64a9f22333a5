"""What the holder of the GPU clocks says (POWER_STATUS_FILE): events on the page and two metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric

from disagg_power.status_file import SET, Status, read

PREFIX = "disagg_proxy_"
CLOCKS_SET, CLOCKS_DEFAULT = "clocks_set", "clocks_default"
"""Kinds of events."""

REASONS = ("no_data", "slo_missed", "permission", "refused", "device", "gone", "stopped")
"""Values of the label ``reason``."""


def process_lives(pid: int) -> bool:
    """Whether there is such a process."""
    return Path(f"/proc/{pid}").exists()


class ClockStatus:
    """Follows one status file.

    Args:
        path: of the file; empty for none.
        lives: whether the process with a PID lives.
    """

    def __init__(self, path: str, lives: Callable[[int], bool] = process_lives) -> None:
        self._path = Path(path) if path else None
        self._lives = lives
        self._last: Status | None = None

    def poll(self) -> tuple[str, str] | None:
        """Look again: kind and text of an event where something has changed since the last look."""
        if self._path is None:
            return None
        before, now = self._last, self._look()
        self._last = now
        if now is None or (before is not None and _key(before) == _key(now)):
            return None
        if now.state == SET:
            clocks = ", ".join(f"{role} at most {mhz} MHz" for role, mhz in now.clocks_mhz.items() if mhz)
            return CLOCKS_SET, "clocks follow the SLO" if now.governor != "off" else f"clocks are set: {clocks}"
        return CLOCKS_DEFAULT, f"GPU clocks are the default ones: {now.why}"

    def _look(self) -> Status | None:
        assert self._path is not None
        found, before = read(self._path), self._last
        if found is not None and found.state == SET and not self._lives(found.pid):
            return Status(found.pid, "default", "the process that held them is gone", "gone", found.governor)
        if found is None and before is not None:
            return Status(before.pid, "default", "they are held no more", "stopped", before.governor)
        return found

    def metrics(self) -> Iterable[Metric]:
        """The families of a scrape; empty while nothing is known."""
        status = self._last
        if status is None:
            return
        cap = GaugeMetricFamily(
            PREFIX + "gpu_clock_cap_hertz", "Highest SM clock that is set for the GPUs of a role", labels=["role"]
        )
        for role, mhz in status.clocks_mhz.items():
            if status.state == SET and mhz is not None:
                cap.add_metric([role], mhz * 1e6)
        yield cap
        default = GaugeMetricFamily(
            PREFIX + "gpu_clocks_default",
            "1 while clocks that were to be set are the default ones for this reason",
            labels=["reason"],
        )
        for reason in REASONS:
            default.add_metric([reason], status.state != SET and status.kind == reason)
        yield default


def _key(status: Status) -> tuple[object, ...]:
    """What makes an event: a governor's clocks change all the time."""
    return status.state, status.why, None if status.governor != "off" else tuple(status.clocks_mhz.items())
