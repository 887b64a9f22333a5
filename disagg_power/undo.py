"""Undoing what a guard has changed: by the guard, by its watcher, and after a crash by `all`, `stop` or `reset`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from disagg_power import state_file
from disagg_power.backends import Backend, NvmlBackend, SudoBackend, ZeusdBackend, candidates, zeusd_socket
from disagg_power.devices import Device, Devices, PowerError
from disagg_power.state_file import Changed, Claimed, State, claimed


@dataclass(frozen=True, slots=True)
class Undone:
    """What became of a state file.

    Attributes:
        gpus: indices of the GPUs that are as they were before.
        failed: why others are not, one sentence each.
        held: the process that still sets these GPUs, in words; then nothing was done.
    """

    gpus: tuple[int, ...] = ()
    failed: tuple[str, ...] = ()
    held: str = ""


def undo_gpu(device: Device, changed: Changed, backend: Backend) -> tuple[Changed, list[str]]:
    """Reset one GPU: what is still changed, and why. One failure does not keep the rest from being reset."""
    failed: list[str] = []

    def attempt(call: Callable[[], None]) -> bool:
        try:
            call()
        except PowerError as error:
            failed.append(str(error))
            return False
        return True

    power = changed.power_before_w
    return (
        replace(
            changed,
            sm=changed.sm and not attempt(lambda: backend.sm_clocks(device, None)),
            memory=changed.memory and not attempt(lambda: backend.memory_clocks(device, None)),
            power_before_w=None if power is None or attempt(lambda: backend.power_limit(device, power)) else power,
        ),
        failed,
    )


def is_undone(changed: Changed) -> bool:
    """Whether nothing of it is left."""
    return not (changed.sm or changed.memory or changed.power_before_w is not None)


def undo(state: State, devices: Devices, backend: Backend) -> tuple[State, list[str]]:
    """Reset every GPU of a state: what is left of it, and why."""
    left: list[Changed] = []
    failed: list[str] = []
    for changed in state.gpus:
        try:
            rest, why = undo_gpu(devices.find(changed.uuid), changed, backend)
        except PowerError as error:
            rest, why = changed, [str(error)]
        failed += why
        if not is_undone(rest):
            left.append(rest)
    return replace(state, gpus=tuple(left)), failed


def undo_file(path: Path, devices: Callable[[], Devices], claims: Path, environ: Mapping[str, str],
              *, but: int | None = None) -> Undone:  # fmt: skip
    """Reset what the file says, unless the process that wrote it still runs, and remove it.

    Args:
        devices: called only when there is something to reset.
        claims: the folder of claims.
        but: the PID of a guard that hangs, whose claim does not count.

    Raises:
        BadState: the file cannot be understood.
        PowerError: the GPUs cannot be listed.
    """
    state = state_file.read(path)
    if state is None:
        return Undone()
    if state.boot != state_file.boot_id():
        # Locks and limits do not survive a restart of the machine.
        path.unlink(missing_ok=True)
        return Undone()
    if but is not None and state.pid == but:
        return _undo(path, state, devices(), environ)
    try:
        with claimed(claims, [changed.uuid for changed in state.gpus]):
            # Another one may have reset it in the meantime.
            state = state_file.read(path)
            return Undone() if state is None else _undo(path, state, devices(), environ)
    except Claimed as error:
        return Undone(held=str(error))


def _undo(path: Path, state: State, devices: Devices, environ: Mapping[str, str]) -> Undone:
    backend = backend_named(state.backend, environ)
    left, failed = undo(state, devices, backend)
    for other in candidates(devices.all(), environ) if left.gpus else ():
        # The way in which they were set is closed; another one may be open.
        if other.name != backend.name:
            left, more = undo(left, devices, other)
            failed = more if left.gpus else []
    state_file.write(path, left)
    done = {one.index for one in state.gpus} - {one.index for one in left.gpus}
    return Undone(tuple(sorted(done)), tuple(failed))


def backend_named(name: str, environ: Mapping[str, str]) -> Backend:
    """The back end of a state file."""
    if name == "sudo":
        return SudoBackend()
    return ZeusdBackend(zeusd_socket(environ)) if name == "zeusd" else NvmlBackend()
