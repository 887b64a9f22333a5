"""What the guard does with its GPUs, without processes or pipes; :mod:`disagg_power.guard_process` runs it.

It changes GPUs of its list only, writes down each change before it makes it, and takes everything back at its end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from disagg_power import state_file
from disagg_power.backends import Backend
from disagg_power.clock_values import ClockSetting, nearest
from disagg_power.devices import APPLICATION_CLOCKS, Device, Devices, NoPermission
from disagg_power.owners import Process
from disagg_power.state_file import Changed, Claimed, Claims, State
from disagg_power.undo import is_undone, undo

SILENCE = 5.0
"""Seconds without a sign of life from the holder of the lease after which everything is reset."""


class Refused(Exception):
    """The guard does not do this; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one GPU is to get; None leaves a setting as it is."""

    sm: ClockSetting | None = None
    memory: ClockSetting | None = None
    power_w: float | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """What one GPU got.

    Attributes:
        sm, memory: in MHz.
        notes: what differs from what was wanted, one sentence each.
    """

    gpu: int
    sm: int | None = None
    memory: int | None = None
    power_w: float | None = None
    notes: tuple[str, ...] = ()


class Guard:
    """Sets GPUs, and resets them.

    Args:
        allowed: the GPUs of this project, by index or UUID; others are refused.
        backend: sets.
        take_over: also set a GPU that looks as if somebody else had set its clocks.
        clock: monotonic seconds.
        beat: called between two changes, each of which may take seconds.
    """

    def __init__(
        self,
        devices: Devices,
        allowed: Sequence[str],
        backend: Backend,
        path: Path,
        claims: Path,
        clock: Callable[[], float],
        *,
        take_over: bool = False,
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        self._devices = devices
        self._allowed = {devices.find(word).uuid for word in allowed}
        self._backend = backend
        self._path = path
        self._claims = Claims(claims)
        self._clock = clock
        self._take_over = take_over
        self._beat = beat
        me = Process.current()
        self._state = State(state_file.boot_id(), backend.name, me.pid, (), sys.executable, me.start)
        self._touched: set[str] = set()
        self._heard = clock()

    def heard(self) -> None:
        """The holder of the lease lives."""
        self._heard = self._clock()

    @property
    def remaining(self) -> float:
        """Seconds until the lease ends; 0 or less when it has."""
        return self._heard + SILENCE - self._clock()

    @property
    def was_undone(self) -> bool:
        """Whether the watcher has reset everything because this process seemed to hang."""
        return bool(self._state.gpus) and not self._path.exists()

    def set(self, word: str, wanted: Wanted) -> Applied:
        """Set one GPU.

        Raises:
            Refused: it is no GPU of this project, or another one's clocks are set on it.
            PowerError: it cannot be set; NoPermission when this user may not.
        """
        device = self._devices.find(word)
        if device.uuid not in self._allowed:
            raise Refused(f"GPU {device.index} is no GPU of this project: PREFILL_GPU and DECODE_GPU name those")
        if device.mig:
            raise Refused(f"GPU {device.index} is divided by MIG: others share its clocks")
        self._claim(device)
        applied = Applied(device.index)
        changed = self._changed(device)
        if wanted.sm is not None:
            range, notes = chosen(device.supported_sm_clocks(), wanted.sm, "SM clock")
            changed = self._note(replace(changed, sm=True))
            self._attempt(changed, lambda: self._backend.sm_clocks(device, range))
            applied = replace(applied, sm=range[1], notes=(*applied.notes, *notes))
        if wanted.memory is not None:
            range, notes = chosen(device.supported_memory_clocks(), wanted.memory, "memory clock")
            changed = self._note(replace(changed, memory=True))
            self._attempt(changed, lambda: self._backend.memory_clocks(device, range))
            applied = replace(applied, memory=range[1], notes=(*applied.notes, *notes))
        if wanted.power_w is not None:
            limits = device.power_limits()
            watts = min(max(wanted.power_w, limits.lowest_w), limits.highest_w)
            before = limits.current_w if changed.power_before_w is None else changed.power_before_w
            changed = self._note(replace(changed, power_before_w=before))
            self._attempt(changed, lambda: self._backend.power_limit(device, watts))
            rounded = (
                [] if watts == wanted.power_w else [f"power limit {wanted.power_w:g} W is out of range: {watts:g} W"]
            )
            applied = replace(applied, power_w=watts, notes=(*applied.notes, *rounded))
        return applied

    def default(self, word: str) -> None:
        """The SM clock of one GPU back to its default; nothing when it was not changed.

        Raises:
            PowerError: it cannot be reset; it stays in the state file.
        """
        device = self._devices.find(word)
        changed = self._changed(device)
        if changed.sm:
            self._attempt(changed, lambda: self._backend.sm_clocks(device, None))
            left = replace(changed, sm=False)
            self._forget(device.uuid, () if is_undone(left) else (left,))

    def reset(self) -> list[str]:
        """Everything as it was before: what failed, one sentence each, which then stays in the state file."""
        self._state, failed = undo(self._state, self._devices, self._backend)
        self._write()
        if not self._state.gpus:
            self._claims.release()
        return failed

    # -- the state

    def _claim(self, device: Device) -> None:
        if any(one.uuid == device.uuid for one in self._state.gpus):
            return
        try:
            self._claims.take(device.uuid)
        except Claimed as error:
            raise Refused(f"the clocks of GPU {device.index} are another one's: {error}") from None
        except OSError as error:
            raise Refused(f"GPU {device.index} cannot be claimed: {error}") from None
        if not self._take_over and device.read().throttle & APPLICATION_CLOCKS:
            self._claims.release(device.uuid)
            raise Refused(
                f"GPU {device.index} is limited by clocks that somebody else has set (applications_clocks_setting): if "
                f"nobody needs them, `nvidia-smi -i {device.index} -rgc`, or POWER_TAKE_OVER=1"
            )

    def _changed(self, device: Device) -> Changed:
        known = next((one for one in self._state.gpus if one.uuid == device.uuid), None)
        return known or Changed(device.uuid, device.index)

    def _note(self, changed: Changed) -> Changed:
        """Write it down before it is done."""
        if changed not in self._state.gpus:
            self._forget(changed.uuid, (changed,))
        return changed

    def _attempt(self, changed: Changed, call: Callable[[], None]) -> None:
        try:
            call()
        except NoPermission:
            # Nothing of this GPU was ever changed: there is nothing to reset.
            if changed.uuid not in self._touched:
                self._forget(changed.uuid, ())
            raise
        finally:
            self._beat()
        self._touched.add(changed.uuid)

    def _forget(self, uuid: str, instead: Sequence[Changed]) -> None:
        others = tuple(one for one in self._state.gpus if one.uuid != uuid)
        self._state = replace(self._state, gpus=(*others, *instead))
        self._write()

    def _write(self) -> None:
        state_file.write(self._path, self._state)


def chosen(supported: Sequence[int], setting: ClockSetting, what: str) -> tuple[tuple[int, int], list[str]]:
    """The range to lock for a setting, and a note where it is another clock than the one that was wanted."""
    mhz = nearest(supported, setting.mhz)
    notes = [] if mhz == setting.mhz else [f"{what} {setting.mhz} MHz is not supported: {mhz} MHz"]
    return (mhz if setting.pinned else supported[0], mhz), notes
