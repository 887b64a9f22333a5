"""The simulated GPU of one engine: its steps are the GPU's load, and the GPU's clock is their pace.

The power model and its units are those of :mod:`disagg_power.simulated`; nothing here is measured on hardware.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque

from disagg_power.devices import PowerError
from disagg_power.meter import GpuMeter
from disagg_power.simulated import GpuModel, Phase, SimulatedGpu, SimulatedGpus

PREFILL_LOAD, DECODE_LOAD = 1.0, 0.6
"""Share of the dynamic power: decode is bound by memory. In the ratio that an H200 showed (docs/energy.md)."""
TICK_SECONDS = 0.1


class EngineGpu:
    """Load, pace and reports of one GPU.

    Args:
        path: file of GPUs that several processes share; empty: a GPU of this engine alone.
        index: which GPU.

    Raises:
        PowerError: the file cannot be used, or has no such GPU.
    """

    def __init__(self, path: str, index: int) -> None:
        gpus = SimulatedGpus.shared(path) if path else SimulatedGpus(models=[GpuModel()] * (index + 1))
        self.gpu: SimulatedGpu = gpus.find(str(index))
        self._meter = GpuMeter(self.gpu)
        self._report = self._meter.sample()
        self._owner = f"engine-{os.getpid()}-{id(self)}"
        self._work: deque[list[float]] = deque()
        """Seconds and load of steps that the GPU has not been seen to spend yet."""
        self._pace: dict[Phase, float] = {"prefill": 1.0, "decode": 1.0}
        self._task: asyncio.Task[None] | None = None
        self._read_pace()

    def start(self) -> None:
        """Follow the work on the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="simulated gpu")

    async def stop(self) -> None:
        """The engine's load ends. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            self._set(0.0, 0.0)

    def step(self, prefill: float, decode: float) -> float:
        """Begin a step that takes these seconds at the highest clock. Returns the seconds at the present one."""
        total = 0.0
        phases: tuple[tuple[float, Phase, float], ...] = (
            (prefill, "prefill", PREFILL_LOAD),
            (decode, "decode", DECODE_LOAD),
        )
        for seconds, phase, load in phases:
            if seconds:
                slowed = seconds / self._pace[phase]
                self._work.append([slowed, load])
                total += slowed
        return total

    def reports(self) -> list[dict[str, object]]:
        """What the announcement says of the GPU."""
        return [self._report.packed()]

    async def _run(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            self._spend(now - last)
            last = now
            self._read_pace()
            self._report = self._meter.sample()

    def _spend(self, seconds: float) -> None:
        """Put the work of the last ``seconds`` on the GPU, as a mean over the next ones."""
        left, busy, weighted = seconds, 0.0, 0.0
        while self._work and left > 0:
            part = min(left, self._work[0][0])
            busy += part
            weighted += part * self._work[0][1]
            left -= part
            self._work[0][0] -= part
            if self._work[0][0] <= 0:
                self._work.popleft()
        self._set(weighted / busy if busy else 0.0, busy / seconds if seconds > 0 else 0.0)

    def _set(self, load: float, share: float) -> None:
        try:
            self.gpu.set_load(load, self._owner, os.getpid(), share)
        except PowerError:
            return  # the GPU is lost: it has no load

    def _read_pace(self) -> None:
        try:
            self._pace = {
                "prefill": self.gpu.pace("prefill", PREFILL_LOAD),
                "decode": self.gpu.pace("decode", DECODE_LOAD),
            }
        except PowerError:
            return
