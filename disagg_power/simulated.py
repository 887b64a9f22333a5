"""Simulated GPUs: clocks, power and an energy counter by a simple model, for tests, demonstrations and the simulator.

Power is ``idle_w + dynamic_w * load * (f / f_max) ** exponent`` with the SM clock f. A busy GPU runs at its highest
clock that the lock and the power limit permit. The speed of a prefill is proportional to f, that of decode to
``min(f, knee)``, so the energy per token over the clock has a minimum that :func:`best_clock` knows.

The state is shared by processes through a file: what one sets another one reads. Nothing here touches hardware.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from disagg_power.devices import (
    APPLICATION_CLOCKS,
    IDLE,
    POWER_CAP,
    DeviceLost,
    NoPermission,
    NotSupported,
    PowerError,
    PowerLimits,
    Reading,
    find_device,
)

COUNTER_SECONDS = 0.1
"""The energy counter moves in steps of this length."""
_SHARED_GPUS = 8
Phase = Literal["prefill", "decode"]
State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class GpuModel:
    """What one simulated GPU is; the defaults resemble an H200.

    Attributes:
        idle_w, dynamic_w, exponent: of the power model; see the module.
        knee_mhz: the clock above which decode is no faster, being bound by memory.
        lowest_mhz, highest_mhz, step_mhz: supported SM clocks; an idle GPU runs at the lowest one.
        counter: whether there is an energy counter.
        settable: whether clocks and limits may be set by a privileged process.
    """

    name: str = "Simulated H200"
    idle_w: float = 90.0
    dynamic_w: float = 560.0
    exponent: float = 2.2
    knee_mhz: int = 1200
    lowest_mhz: int = 345
    highest_mhz: int = 1980
    step_mhz: int = 15
    memory_clocks_mhz: tuple[int, ...] = (1593, 3201)
    limit_w: float = 700.0
    lowest_limit_w: float = 200.0
    counter: bool = True
    power_reading: bool = True
    mig: bool = False
    settable: bool = True

    def clocks(self) -> tuple[int, ...]:
        """The supported SM clocks, ascending."""
        return tuple(range(self.lowest_mhz, self.highest_mhz + 1, self.step_mhz))

    def power(self, clock_mhz: float, load: float) -> float:
        """Watts at this SM clock and load (0 to 1)."""
        return self.idle_w + self.dynamic_w * load * math.pow(clock_mhz / self.highest_mhz, self.exponent)

    def pace(self, clock_mhz: float, phase: Phase) -> float:
        """Speed relative to the highest clock."""
        if phase == "prefill":
            return clock_mhz / self.highest_mhz
        knee = min(self.knee_mhz, self.highest_mhz)
        return min(clock_mhz, knee) / knee


def best_clock(model: GpuModel, phase: Phase, load: float = 1.0) -> int:
    """The supported clock with the least energy per token while the GPU works: the known optimum of the model."""
    return min(model.clocks(), key=lambda clock: model.power(clock, load) / model.pace(clock, phase))


class SimulatedGpus:
    """GPUs of :class:`GpuModel` s, whose state stands in ``path``, or in this object without one.

    Args:
        models: creates the state; None uses what is in the file.
        privileged: whether this process may set clocks and limits.
        clock: seconds; processes that share a file need the same one.

    Raises:
        PowerError: ``models`` is None and there is no readable file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        models: Sequence[GpuModel] | None = None,
        *,
        privileged: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.clock = clock
        self.privileged = privileged
        self._state: State = {"gpus": [], "changes": 0}
        if models is not None:
            self._state["gpus"] = [_fresh(model, index, clock()) for index, model in enumerate(models)]
            if self.path is not None:
                with self._locked():
                    self._write()
        elif self.path is None:
            raise PowerError("simulated GPUs need a file or models")
        with self.state() as state:
            self._devices = [
                SimulatedGpu(self, index, gpu["uuid"], GpuModel(**{**gpu["model"], "memory_clocks_mhz": _memory(gpu)}))
                for index, gpu in enumerate(state["gpus"])
            ]

    @classmethod
    def shared(cls, path: str | os.PathLike[str], *, privileged: bool = False) -> SimulatedGpus:
        """The GPUs of ``path``; eight of the default model where there is no file, or one from before a reboot.

        Raises:
            PowerError: the file cannot be read or written.
        """
        found = cls(models=(), privileged=privileged)
        found.path = Path(path)
        try:
            with found._locked():
                if not _is_current(found.path, found.clock()):
                    found._state["gpus"] = [_fresh(GpuModel(), index, found.clock()) for index in range(_SHARED_GPUS)]
                    found._write()
        except OSError as error:
            raise PowerError(f"simulated GPUs cannot be kept in {path}: {error}") from None
        return cls(path, privileged=privileged)

    def all(self) -> Sequence[SimulatedGpu]:
        return self._devices

    def find(self, word: str) -> SimulatedGpu:
        found = find_device(self._devices, word)
        assert isinstance(found, SimulatedGpu)
        return found

    def close(self) -> None:
        """Nothing to release."""

    @property
    def changes(self) -> int:
        """How often any process tried to set or reset something; a run that may set nothing leaves it at 0."""
        with self.state() as state:
            return int(state["changes"])

    @contextlib.contextmanager
    def state(self, *, write: bool = False) -> Iterator[State]:
        """The state, locked against other processes; ``write`` keeps what is changed in it."""
        if self.path is None:
            yield self._state
            return
        with self._locked():
            try:
                self._state = json.loads(self.path.read_text("utf-8"))
            except (OSError, ValueError) as error:
                raise PowerError(f"simulated GPUs cannot be read from {self.path}: {error}") from None
            try:
                yield self._state
            finally:
                if write:
                    self._write()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(f"{self.path}.lock", "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self) -> None:
        """Replaces the file as a whole, so that a process killed here leaves a readable one."""
        assert self.path is not None
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text(json.dumps(self._state), "utf-8")
        new.replace(self.path)


class SimulatedGpu:
    """One simulated GPU: :class:`disagg_power.devices.Device`, and what a test or a simulated engine does to it."""

    simulated = True

    def __init__(self, gpus: SimulatedGpus, index: int, uuid: str, model: GpuModel) -> None:
        self._gpus = gpus
        self.index = index
        self.uuid = uuid
        self.model = model
        self.name = model.name
        self.mig = model.mig

    # -- reading

    def read(self) -> Reading:
        with self._gpu() as gpu:
            now = self._gpus.clock()
            model = self.model
            (load, mean, share), clock = self._loads(gpu), self._clock(gpu)
            watts = model.power(clock, mean)
            throttle = 0 if load else IDLE
            if load and clock < self._permitted(gpu):
                throttle |= POWER_CAP
            if load and self._permitted(gpu) < model.highest_mhz:
                throttle |= APPLICATION_CLOCKS
            counter = math.floor(self._counted(gpu, now) - gpu["base_mj"])
            return Reading(
                at=now,
                energy_mj=counter if model.counter else None,
                power_w=watts if model.power_reading else None,
                sm_clock_mhz=clock,
                memory_clock_mhz=self._memory_clock(gpu, load),
                utilization=round(share, 3),
                temperature_c=30.0 + 0.07 * watts,
                throttle=throttle,
                power_limit_w=gpu["limit_w"],
            )

    def supported_sm_clocks(self) -> tuple[int, ...]:
        with self._gpu():
            return self.model.clocks()

    def supported_memory_clocks(self) -> tuple[int, ...]:
        with self._gpu():
            return self.model.memory_clocks_mhz

    def power_limits(self) -> PowerLimits:
        with self._gpu() as gpu:
            return PowerLimits(gpu["limit_w"], self.model.limit_w, self.model.lowest_limit_w, self.model.limit_w)

    def sm_lock(self) -> tuple[int, int] | None:
        """The locked range of SM clocks, None when it is the default. NVML cannot tell this; it is for tests."""
        with self._gpu() as gpu:
            return tuple(gpu["sm_lock"]) if gpu["sm_lock"] else None

    def memory_lock(self) -> tuple[int, int] | None:
        """The same for the memory clock."""
        with self._gpu() as gpu:
            return tuple(gpu["memory_lock"]) if gpu["memory_lock"] else None

    # -- setting

    def lock_sm_clocks(self, lowest: int, highest: int) -> None:
        self._set("sm_lock", self._range(self.model.clocks(), lowest, highest))

    def reset_sm_clocks(self) -> None:
        self._set("sm_lock", None)

    def lock_memory_clocks(self, lowest: int, highest: int) -> None:
        self._set("memory_lock", self._range(self.model.memory_clocks_mhz, lowest, highest))

    def reset_memory_clocks(self) -> None:
        self._set("memory_lock", None)

    def set_power_limit(self, watts: float) -> None:
        if not self.model.lowest_limit_w <= watts <= self.model.limit_w:
            raise NotSupported(f"GPU {self.index}: {watts:g} W is out of range")
        self._set("limit_w", watts)

    # -- what a simulated engine and a test do

    def set_load(self, load: float, owner: str = "test", pid: int | None = None, share: float = 1.0) -> None:
        """The load that ``owner`` puts on the GPU from now on, 0 to 1; loads of several owners add up to at most 1.

        Args:
            pid: the load ends with this process.
            share: of the time during which it is busy with that load.
        """
        with self._gpu(write=True) as gpu:
            self._advance(gpu)
            if load > 0 and share > 0:
                gpu["loads"][owner] = [load, pid, share]
            else:
                gpu["loads"].pop(owner, None)

    def pace(self, phase: Phase, load: float = 1.0) -> float:
        """Speed of a GPU busy with ``load`` at the present lock and limit, relative to the highest clock."""
        with self._gpu() as gpu:
            return self.model.pace(self._busy_clock(gpu, load), phase)

    def set_lost(self, lost: bool = True) -> None:
        """Let the GPU go away, or come back."""
        with self._gpus.state(write=True) as state:
            state["gpus"][self.index]["lost"] = lost

    def set_settable(self, settable: bool) -> None:
        """Give or take the permission to set clocks and limits, also for privileged processes."""
        with self._gpus.state(write=True) as state:
            state["gpus"][self.index]["settable"] = settable

    def restart_counter(self) -> None:
        """Let the energy counter begin at 0 again, as after the driver was loaded anew."""
        with self._gpu(write=True) as gpu:
            gpu["base_mj"] = self._counted(gpu, self._gpus.clock())

    # -- the model

    @contextlib.contextmanager
    def _gpu(self, *, write: bool = False) -> Iterator[dict[str, Any]]:
        with self._gpus.state(write=write) as state:
            gpu = state["gpus"][self.index]
            if gpu["lost"]:
                raise DeviceLost(f"GPU {self.index}: GPU is lost")
            yield gpu

    def _set(self, name: str, value: Any) -> None:
        with self._gpus.state(write=True) as state:
            gpu = state["gpus"][self.index]
            state["changes"] += 1
            if gpu["lost"]:
                raise DeviceLost(f"GPU {self.index}: GPU is lost")
            if not (self._gpus.privileged and gpu["settable"]):
                raise NoPermission(f"GPU {self.index}: Insufficient Permissions")
            self._advance(gpu)
            gpu[name] = value

    def _range(self, clocks: Sequence[int], lowest: int, highest: int) -> list[int]:
        """As NVML: a range is taken when it is in order; the clocks in it are those that are supported."""
        inside = [clock for clock in clocks if lowest <= clock <= highest]
        if not inside:
            raise NotSupported(f"GPU {self.index}: no supported clock from {lowest} to {highest} MHz")
        return [inside[0], inside[-1]]

    def _loads(self, gpu: dict[str, Any]) -> tuple[float, float, float]:
        """The load while it is busy, its mean over time, and the share of time with any."""
        loads = [(load, share) for load, pid, share in gpu["loads"].values() if pid is None or _lives(pid)]
        busy = min(1.0, sum(load for load, _ in loads))
        return busy, min(1.0, sum(load * share for load, share in loads)), min(1.0, sum(share for _, share in loads))

    def _permitted(self, gpu: dict[str, Any]) -> int:
        return int(gpu["sm_lock"][1]) if gpu["sm_lock"] else self.model.highest_mhz

    def _busy_clock(self, gpu: dict[str, Any], load: float) -> int:
        model, permitted = self.model, self._permitted(gpu)
        within = [c for c in model.clocks() if c <= permitted and model.power(c, load) <= gpu["limit_w"]]
        return within[-1] if within else model.lowest_mhz

    def _clock(self, gpu: dict[str, Any]) -> int:
        load, _, _ = self._loads(gpu)
        if load:
            return self._busy_clock(gpu, load)
        return int(gpu["sm_lock"][0]) if gpu["sm_lock"] else self.model.lowest_mhz

    def _memory_clock(self, gpu: dict[str, Any], load: float) -> int:
        lock = gpu["memory_lock"]
        if lock:
            return int(lock[1] if load else lock[0])
        return self.model.memory_clocks_mhz[-1 if load else 0]

    def _energy(self, gpu: dict[str, Any], moment: float) -> float:
        """Millijoules drawn until ``moment``, which is not before the last change."""
        _, mean, _ = self._loads(gpu)
        return float(gpu["energy_mj"] + self.model.power(self._clock(gpu), mean) * 1e3 * (moment - gpu["at"]))

    def _counted(self, gpu: dict[str, Any], now: float) -> float:
        """The energy at the counter's last step."""
        tick = math.floor(now / COUNTER_SECONDS + 1e-9) * COUNTER_SECONDS
        return self._energy(gpu, tick) if tick > gpu["at"] else float(gpu["counted_mj"])

    def _advance(self, gpu: dict[str, Any]) -> None:
        """Account for the time since the last change, before the next one."""
        now = self._gpus.clock()
        gpu["counted_mj"] = self._counted(gpu, now)
        gpu["energy_mj"], gpu["at"] = self._energy(gpu, now), now


def _fresh(model: GpuModel, index: int, now: float) -> dict[str, Any]:
    return {
        "uuid": f"GPU-51b00000-0000-4000-8000-{index:012d}",
        "model": asdict(model),
        "at": now,
        "energy_mj": 0.0,
        "counted_mj": 0.0,
        "base_mj": 0.0,
        "loads": {},
        "sm_lock": None,
        "memory_lock": None,
        "limit_w": model.limit_w,
        "lost": False,
        "settable": model.settable,
    }


def _memory(gpu: dict[str, Any]) -> tuple[int, ...]:
    return tuple(gpu["model"]["memory_clocks_mhz"])


def _is_current(path: Path, now: float) -> bool:
    """Whether the file is of this boot: the monotonic clock begins anew with each."""
    try:
        return all(gpu["at"] <= now for gpu in json.loads(path.read_text("utf-8"))["gpus"])
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError) as error:
        raise PowerError(f"simulated GPUs cannot be read from {path}: {error}") from None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
