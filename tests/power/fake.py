"""A guard over simulated GPUs, with a clock that tests turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disagg_power.backends import NvmlBackend
from disagg_power.guard import Guard
from disagg_power.simulated import GpuModel, SimulatedGpus


class Clock:
    """Monotonic seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def two_gpus(folder: Path, clock: Clock | None = None) -> SimulatedGpus:
    """Two H200s, shared through a file."""
    folder.mkdir(exist_ok=True)
    if clock is None:
        return SimulatedGpus(folder / "gpus.json", [GpuModel(), GpuModel()])
    return SimulatedGpus(folder / "gpus.json", [GpuModel(), GpuModel()], clock=clock)


def guard_over(
    gpus: SimulatedGpus, folder: Path, clock: Clock, allowed: Sequence[str] = ("0", "1"), *, take_over: bool = False
) -> Guard:
    """A guard; the state and the claims of one checkout are in ``folder`` and beside the GPUs."""
    assert gpus.path is not None
    return Guard(gpus, allowed, NvmlBackend(), folder / "power.state", gpus.path.parent, clock, take_over=take_over)
