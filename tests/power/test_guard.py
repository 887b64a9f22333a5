"""What the guard sets, refuses, writes down and takes back; the GPUs are simulated, nothing is a process."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from disagg_power import state_file
from disagg_power.clock_values import ClockSetting
from disagg_power.devices import DeviceLost, NoPermission
from disagg_power.guard import SILENCE, Guard, Refused, Wanted
from disagg_power.simulated import SimulatedGpus
from disagg_power.state_file import BadState
from disagg_power.undo import Undone, undo_file
from tests.power.fake import Clock, guard_over, two_gpus

CAP = Wanted(sm=ClockSetting(1410))
PRIVILEGED = {"POWER_SIMULATED_PRIVILEGED": "1"}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gpus(tmp_path: Path, clock: Clock) -> SimulatedGpus:
    return two_gpus(tmp_path / "machine", clock)


@pytest.fixture
def guard(gpus: SimulatedGpus, tmp_path: Path, clock: Clock) -> Guard:
    return guard_over(gpus, tmp_path, clock)


def locks(gpus: SimulatedGpus) -> list[tuple[int, int] | None]:
    return [gpu.sm_lock() for gpu in gpus.all()]


def undo(folder: Path, gpus: SimulatedGpus) -> Undone:
    assert gpus.path is not None
    return undo_file(folder / "power.state", lambda: gpus, gpus.path.parent, PRIVILEGED)


# -- setting


def test_a_cap_lets_an_idle_gpu_sleep_and_a_lock_pins_it(gpus: SimulatedGpus, guard: Guard) -> None:
    guard.set("0", CAP)
    guard.set("1", Wanted(sm=ClockSetting(1410, pinned=True)))
    assert locks(gpus) == [(345, 1410), (1410, 1410)]
    assert [gpu.read().sm_clock_mhz for gpu in gpus.all()] == [345, 1410]


def test_a_clock_is_rounded_to_a_supported_one_and_that_is_said(gpus: SimulatedGpus, guard: Guard) -> None:
    applied = guard.set("0", Wanted(sm=ClockSetting(1400)))
    assert applied.sm == 1395 and applied.notes == ("SM clock 1400 MHz is not supported: 1395 MHz",)
    assert guard.set("0", CAP).notes == ()


def test_a_power_limit_out_of_range_becomes_the_nearest_one(gpus: SimulatedGpus, guard: Guard) -> None:
    applied = guard.set("0", Wanted(power_w=50))
    assert applied.power_w == 200 and applied.notes == ("power limit 50 W is out of range: 200 W",)
    assert gpus.all()[0].power_limits().current_w == 200


def test_memory_clocks_are_touched_only_when_they_are_set(gpus: SimulatedGpus, guard: Guard) -> None:
    guard.set("0", CAP)
    assert gpus.all()[0].memory_lock() is None
    guard.reset()
    changes = gpus.changes
    guard.set("0", Wanted(memory=ClockSetting(1593)))
    assert gpus.all()[0].memory_lock() == (1593, 1593) and gpus.all()[0].sm_lock() is None
    guard.reset()
    assert gpus.changes == changes + 2


def test_a_gpu_of_somebody_else_is_refused(gpus: SimulatedGpus, tmp_path: Path, clock: Clock) -> None:
    guard = guard_over(gpus, tmp_path, clock, ["1"])
    with pytest.raises(Refused, match="GPU 0 is no GPU of this project"):
        guard.set("0", CAP)
    assert gpus.changes == 0


def test_a_lock_of_somebody_else_is_refused_unless_it_may_be_taken_over(
    gpus: SimulatedGpus, guard: Guard, tmp_path: Path, clock: Clock
) -> None:
    gpus.all()[0].lock_sm_clocks(345, 990)
    gpus.all()[0].set_load(1.0)
    with pytest.raises(Refused, match="somebody else has set"):
        guard.set("0", CAP)
    assert locks(gpus)[0] == (345, 990) and not (tmp_path / "power.state").exists()
    guard_over(gpus, tmp_path, clock, take_over=True).set("0", CAP)
    assert locks(gpus)[0] == (345, 1410)


def test_two_checkouts_do_not_set_the_same_gpu(gpus: SimulatedGpus, tmp_path: Path, clock: Clock) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    first, second = guard_over(gpus, one, clock), guard_over(gpus, other, clock)
    first.set("0", CAP)
    second.set("1", CAP)
    with pytest.raises(Refused, match="process"):
        second.set("0", CAP)
    second.reset()
    assert locks(gpus) == [(345, 1410), None]
    first.reset()
    assert locks(gpus) == [None, None]
    second.set("0", CAP)


# -- taking back


def test_everything_is_as_it_was_before(gpus: SimulatedGpus, guard: Guard, tmp_path: Path) -> None:
    gpus.all()[0].set_power_limit(650)
    guard.set("0", Wanted(sm=ClockSetting(1410), memory=ClockSetting(1593), power_w=400))
    guard.set("0", Wanted(power_w=300))
    assert guard.reset() == []
    assert locks(gpus) == [None, None] and gpus.all()[0].memory_lock() is None
    assert gpus.all()[0].power_limits().current_w == 650, "not the default: what it was"
    assert not (tmp_path / "power.state").exists()


def test_one_gpu_back_to_default_keeps_the_other(gpus: SimulatedGpus, guard: Guard, tmp_path: Path) -> None:
    guard.set("0", CAP)
    guard.set("1", CAP)
    guard.set("1", Wanted(power_w=400))
    guard.default("0")
    guard.default("0")
    assert locks(gpus) == [None, (345, 1410)]
    guard.default("1")
    assert locks(gpus) == [None, None] and gpus.all()[1].power_limits().current_w == 400, "clocks only"
    state = state_file.read(tmp_path / "power.state")
    assert state is not None and [one.index for one in state.gpus] == [1]


def test_a_change_is_written_down_before_it_is_made(
    gpus: SimulatedGpus, guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = gpus.all()[0]
    seen: list[object] = []
    monkeypatch.setattr(gpu, "lock_sm_clocks", lambda *_: seen.append(state_file.read(tmp_path / "power.state")))
    guard.set("0", CAP)
    (state,) = seen
    assert isinstance(state, state_file.State) and state.gpus[0].sm and state.gpus[0].uuid == gpu.uuid


def test_the_lease_ends_five_seconds_after_the_last_sign_of_life(guard: Guard, clock: Clock) -> None:
    clock.now += SILENCE - 0.1
    assert guard.remaining > 0
    guard.heard()
    clock.now += SILENCE
    assert guard.remaining <= 0


# -- permissions


def test_without_permission_nothing_is_left_to_reset(gpus: SimulatedGpus, guard: Guard, tmp_path: Path) -> None:
    gpus.all()[0].set_settable(False)
    with pytest.raises(NoPermission):
        guard.set("0", CAP)
    assert not (tmp_path / "power.state").exists()


def test_permission_lost_in_the_middle_is_said_and_the_next_reset_takes_it_back(
    gpus: SimulatedGpus, guard: Guard, tmp_path: Path
) -> None:
    guard.set("0", CAP)
    gpus.all()[0].set_settable(False)
    with pytest.raises(NoPermission):
        guard.set("0", Wanted(sm=ClockSetting(990)))
    (failure,) = guard.reset()
    assert "Permission" in failure and (tmp_path / "power.state").exists()
    gpus.all()[0].set_settable(True)
    assert guard.reset() == [] and locks(gpus) == [None, None]


def test_a_lost_gpu_does_not_keep_the_others_from_being_reset(gpus: SimulatedGpus, guard: Guard) -> None:
    guard.set("0", CAP)
    guard.set("1", CAP)
    gpus.all()[0].set_lost()
    with pytest.raises(DeviceLost):
        guard.set("0", CAP)
    assert len(guard.reset()) == 1
    gpus.all()[0].set_lost(False)
    assert locks(gpus) == [(345, 1410), None]
    assert guard.reset() == [] and locks(gpus) == [None, None]


# -- after a crash


def killed(guard: Guard) -> None:
    """What the kernel does at SIGKILL: claims end, the state file stays."""
    guard._claims.release()


def test_what_a_killed_guard_left_is_reset_by_the_next_one(gpus: SimulatedGpus, guard: Guard, tmp_path: Path) -> None:
    guard.set("0", Wanted(sm=ClockSetting(1410), power_w=400))
    killed(guard)
    assert undo(tmp_path, gpus) == Undone(gpus=(0,))
    assert locks(gpus) == [None, None] and gpus.all()[0].power_limits().current_w == 700
    assert undo(tmp_path, gpus) == Undone()


def test_a_guard_that_lives_is_left_in_peace(gpus: SimulatedGpus, guard: Guard, tmp_path: Path) -> None:
    guard.set("0", CAP)
    assert "process" in undo(tmp_path, gpus).held
    assert locks(gpus)[0] == (345, 1410)


def test_a_guard_that_hangs_is_reset_although_it_holds_its_claims(
    gpus: SimulatedGpus, guard: Guard, tmp_path: Path
) -> None:
    guard.set("0", CAP)
    state = state_file.read(tmp_path / "power.state")
    assert state is not None and gpus.path is not None
    done = undo_file(tmp_path / "power.state", lambda: gpus, gpus.path.parent, PRIVILEGED, but=state.pid)
    assert done.gpus == (0,) and locks(gpus) == [None, None]


def test_a_guard_notices_that_its_watcher_has_reset(gpus: SimulatedGpus, guard: Guard, tmp_path: Path) -> None:
    assert not guard.was_undone
    guard.set("0", CAP)
    assert not guard.was_undone
    assert gpus.path is not None
    undo_file(tmp_path / "power.state", lambda: gpus, gpus.path.parent, PRIVILEGED, but=os.getpid())
    assert guard.was_undone


def test_after_a_restart_of_the_machine_there_is_nothing_to_reset(
    gpus: SimulatedGpus, guard: Guard, tmp_path: Path
) -> None:
    guard.set("0", CAP)
    killed(guard)
    state = state_file.read(tmp_path / "power.state")
    assert state is not None
    state_file.write(tmp_path / "power.state", replace(state, boot="another"))
    changes = gpus.changes
    assert undo(tmp_path, gpus) == Undone() and gpus.changes == changes
    assert not (tmp_path / "power.state").exists()


def test_what_cannot_be_reset_stays_written_down(gpus: SimulatedGpus, guard: Guard, tmp_path: Path) -> None:
    guard.set("0", CAP)
    guard.set("1", CAP)
    killed(guard)
    gpus.all()[0].set_settable(False)
    done = undo(tmp_path, gpus)
    assert done.gpus == (1,) and len(done.failed) == 1
    gpus.all()[0].set_settable(True)
    assert undo(tmp_path, gpus).gpus == (0,)


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2}', '{"format": 1, "gpus": 3}', "\x00"])
def test_a_broken_state_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "power.state").write_text(text)
    with pytest.raises(BadState, match=r"power\.state"):
        state_file.read(tmp_path / "power.state")
