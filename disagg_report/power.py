"""Power of GPUs, sampled through NVML (pynvml of nvidia-ml-py) several times a second.

Energy is the integral of the samples, which have an error of up to 5 %. The host (CPUs, memory, fans) is not included.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_report.records import Power

INTERVAL = 0.1

NO_PYNVML = "pynvml is not installed (pip install nvidia-ml-py)"


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
    """Samples the power of each role's GPUs from :meth:`start` to :meth:`stop`, in a thread.

    Args:
        roles: GPUs by role: indices as in ``nvidia-smi``, or UUIDs.

    Raises:
        NoPower: no pynvml, no driver, or a GPU that does not report its power.
    """

    def __init__(self, roles: Mapping[str, Sequence[str]]) -> None:
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError:
            raise NoPower(NO_PYNVML) from None
        try:
            self._nvml.nvmlInit()
            self._handles = {name: self._handle(name) for names in roles.values() for name in names}
            for handle in self._handles.values():
                self._nvml.nvmlDeviceGetPowerUsage(handle)
        except (self._nvml.NVMLError, ValueError) as error:
            raise NoPower(f"the GPUs' power cannot be read: {error}") from None
        self._roles = {role: tuple(names) for role, names in roles.items() if names}
        self._samples: dict[str, list[tuple[float, float]]] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def _handle(self, name: str) -> Any:
        if name.startswith("GPU-"):
            return self._nvml.nvmlDeviceGetHandleByUUID(name)
        return self._nvml.nvmlDeviceGetHandleByIndex(int(name))

    def start(self) -> None:
        """Discard previous samples and start."""
        self._samples = {name: [] for name in self._handles}
        self._ended.clear()
        self._read()
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)
        self._thread.start()

    def stop(self, window: tuple[float, float] | None = None) -> dict[str, Power]:
        """Stop, and return the power of each role within ``window`` (``time.monotonic``), or since the start."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._read()
        first = min((samples[0][0] for samples in self._samples.values() if samples), default=0.0)
        last = max((samples[-1][0] for samples in self._samples.values() if samples), default=0.0)
        begin, end = window or (first, last)
        if end <= begin:
            return {}
        found = {}
        for role, names in self._roles.items():
            if all(self._samples[name] for name in names):
                joules = sum(energy(self._samples[name], begin, end) for name in names)
                found[role] = Power(names, joules / (end - begin), joules, end - begin)
        return found

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._read()

    def _read(self) -> None:
        for name, handle in self._handles.items():
            try:
                milliwatts = self._nvml.nvmlDeviceGetPowerUsage(handle)
            except self._nvml.NVMLError:
                continue
            self._samples[name].append((time.monotonic(), milliwatts / 1e3))
