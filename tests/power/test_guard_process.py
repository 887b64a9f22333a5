"""The guard, its watcher and the holder of its lease as processes, each of which is killed with SIGKILL."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path

import pytest

from disagg_power import guard_process, watcher
from disagg_power.clock_values import ClockSetting
from disagg_power.guard import Wanted
from disagg_power.guard_process import Watcher
from disagg_power.lease import Lease, LeaseError, guard_words
from disagg_power.simulated import SimulatedGpus
from tests.power.fake import Clock, guard_over, two_gpus

WAIT = 30.0
"""Seconds until a test gives up; what it waits for comes at once or after the 5 s of a lease."""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """PIDs of the children of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def beat(lease: Lease) -> None:
    with contextlib.suppress(LeaseError):
        while True:
            lease.beat()
            time.sleep(0.5)


class Checkout:
    """One RUN_DIR over simulated GPUs."""

    def __init__(self, gpus: SimulatedGpus, folder: Path) -> None:
        folder.mkdir()
        self.gpus = gpus
        self.folder = folder
        self.environ = {**os.environ, "POWER_SIMULATED": str(gpus.path), "POWER_SIMULATED_PRIVILEGED": "1"}
        self.words = guard_words(folder / "power.state", ["0", "1"], "auto")
        self.started: list[subprocess.Popen[bytes]] = []

    def lease(self) -> Lease:
        """One whose signs of life do not depend on how fast the test is."""
        lease = Lease(self.words, self.environ)
        threading.Thread(target=beat, args=(lease,), daemon=True).start()
        return lease

    def holder(self, *more: str) -> subprocess.Popen[bytes]:
        """`power hold`, once it has set both GPUs."""
        words = [sys.executable, "-m", "disagg_power", "hold", "--run-dir", str(self.folder)]
        words += ["--prefill-gpus", "0", "--decode-gpus", "1", "--prefill-sm", "1500", "--decode-sm", "lock:990", *more]
        process = subprocess.Popen(words, env=self.environ)
        self.started.append(process)
        until(lambda: self.locks == [(345, 1500), (990, 990)] and (self.folder / "power.status").exists())
        return process

    @property
    def locks(self) -> list[tuple[int, int] | None]:
        return [gpu.sm_lock() for gpu in self.gpus.all()]

    @property
    def is_default(self) -> bool:
        return self.locks == [None, None]

    def power(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "disagg_power", *words, "--state", str(self.folder / "power.state")]
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, check=False)


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    return two_gpus(tmp_path / "machine")


@pytest.fixture
def checkout(gpus: SimulatedGpus, tmp_path: Path) -> Iterator[Checkout]:
    one = Checkout(gpus, tmp_path / "run")
    yield one
    for process in one.started:
        process.kill()
        process.wait()


def test_a_lease_sets_answers_and_resets(checkout: Checkout) -> None:
    lease = checkout.lease()
    assert lease.set("0", sm="1400")["notes"] == ["SM clock 1400 MHz is not supported: 1395 MHz"]
    lease.beat()
    assert checkout.locks == [(345, 1395), None]
    with pytest.raises(LeaseError, match="no clock") as refused:
        lease.set("0", sm="fast")
    assert refused.value.kind == "refused"
    assert lease.close() == 0
    assert checkout.is_default and not (checkout.folder / "power.state").exists()


def test_without_permission_one_line_says_why(checkout: Checkout) -> None:
    checkout.environ["POWER_SIMULATED_PRIVILEGED"] = "0"
    with pytest.raises(LeaseError, match="everything else works") as refused:
        checkout.lease()
    assert refused.value.kind == "permission" and checkout.gpus.changes == 0
    checkout.words = guard_words(checkout.folder / "power.state", ["0"], "none")
    with pytest.raises(LeaseError, match="POWER_BACKEND=none"):
        checkout.lease()


def test_a_guard_killed_is_followed_by_its_watcher(checkout: Checkout) -> None:
    lease = checkout.lease()
    lease.set("0", sm="1500", power="400")
    os.kill(lease.pid, signal.SIGKILL)
    until(lambda: checkout.is_default and checkout.gpus.all()[0].power_limits().current_w == 700)
    with pytest.raises(LeaseError, match="gone"):
        while True:
            lease.beat()
    lease.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_guard_that_is_stopped_resets(checkout: Checkout, number: int) -> None:
    lease = checkout.lease()
    lease.set("1", sm="1500")
    os.kill(lease.pid, number)
    until(lambda: checkout.is_default)
    lease.close()


def test_a_watcher_killed_is_started_again(checkout: Checkout) -> None:
    lease = checkout.lease()
    lease.set("0", sm="1500")
    (first,) = children(lease.pid)
    os.kill(first, signal.SIGKILL)
    until(lambda: bool(found := children(lease.pid)) and found != [first])
    os.kill(lease.pid, signal.SIGKILL)
    until(lambda: checkout.is_default)
    lease.close()


def test_a_holder_killed_ends_the_lease(checkout: Checkout) -> None:
    holder = checkout.holder()
    holder.kill()
    until(lambda: checkout.is_default)


def test_the_holder_ends_when_its_owner_is_killed(checkout: Checkout) -> None:
    """As the supervisor is, for which `all` asks for clocks."""
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[19]
    holder = checkout.holder("--owner", f"{owner.pid}:{start}")
    owner.kill()
    owner.communicate()
    assert holder.wait(WAIT) == 0 and checkout.is_default
    assert not (checkout.folder / "power.status").exists()


@pytest.mark.parametrize("order", list(permutations(("holder", "guard", "watcher"))), ids="-".join)
def test_each_order_of_deaths(checkout: Checkout, order: tuple[str, ...]) -> None:
    """All are killed at once, in this order; what the last ones have not reset the next command does."""
    holder = checkout.holder()
    (guard,) = children(holder.pid)
    pids = {"holder": holder.pid, "guard": guard, "watcher": children(guard)[0]}
    for name in order:
        os.kill(pids[name], signal.SIGKILL)
    until(lambda: checkout.is_default or (checkout.power("reset").returncode == 0 and checkout.is_default))


def test_after_all_were_killed_clocks_says_so_and_reset_resets(checkout: Checkout) -> None:
    guard = guard_over(checkout.gpus, checkout.folder, Clock())
    guard.set("0", Wanted(sm=ClockSetting(1500)))
    guard._claims.release()
    found = json.loads(checkout.power("clocks", "--json").stdout)
    assert [gpu["changed"] for gpu in found["gpus"]] == [True, False]
    done = checkout.power("reset")
    assert done.returncode == 0 and done.stdout == "GPU 0: clocks and power limit are as they were before\n"
    assert checkout.is_default and checkout.power("reset").stdout == "nothing to reset\n"


def test_a_new_guard_resets_first_what_an_old_one_left(checkout: Checkout) -> None:
    guard = guard_over(checkout.gpus, checkout.folder, Clock())
    guard.set("1", Wanted(sm=ClockSetting(990)))
    guard._claims.release()
    lease = checkout.lease()
    assert checkout.is_default
    lease.close()


def test_two_checkouts_on_one_machine(checkout: Checkout, gpus: SimulatedGpus, tmp_path: Path) -> None:
    other = Checkout(gpus, tmp_path / "other run")
    first, second = checkout.lease(), other.lease()
    first.set("0", sm="1500")
    second.set("1", sm="990")
    with pytest.raises(LeaseError, match=f"process {first.pid}"):
        second.set("0", sm="990")
    assert other.power("reset").returncode == 1, "its own guard lives"
    second.close()
    assert checkout.locks == [(345, 1500), None]
    assert other.power("reset").stdout == "nothing to reset\n"
    first.close()
    assert checkout.is_default


def test_permission_lost_in_the_middle(checkout: Checkout) -> None:
    lease = checkout.lease()
    lease.set("0", sm="1500")
    checkout.gpus.all()[0].set_settable(False)
    with pytest.raises(LeaseError) as refused:
        lease.set("0", sm="990")
    assert refused.value.kind == "permission"
    assert lease.close() == 1, "the exit code says that something is left"
    assert checkout.power("reset").returncode == 1
    checkout.gpus.all()[0].set_settable(True)
    assert checkout.power("reset").returncode == 0 and checkout.is_default


# -- the loops, without processes


def test_without_a_sign_of_life_the_guard_resets(
    gpus: SimulatedGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    guard = guard_over(gpus, tmp_path, clock)
    guard.set("0", Wanted(sm=ClockSetting(1500)))
    reading, writing = os.pipe()

    class Silent(Watcher):
        def __init__(self) -> None: ...

        def beat(self) -> bool:
            clock.now += 1
            return True

        def end(self) -> None: ...

    monkeypatch.setattr(guard_process, "TICK", 0.0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    lines: list[str] = []
    try:
        assert guard_process.run(guard, Silent(), lines.append, reading) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    os.close(reading)
    os.close(writing)
    assert gpus.all()[0].sm_lock() is None and "no sign of life" in lines[-1]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["event"] == "reset"


def test_a_watcher_resets_when_the_guard_hangs_and_when_it_is_gone() -> None:
    reading, writing = os.pipe()
    clock = Clock()
    seen: list[bool] = []

    def undo(hangs: bool) -> None:
        seen.append(hangs)
        if hangs:
            os.close(writing)

    def ticking() -> float:
        clock.now += 1
        return clock()

    watcher.watch(reading, undo, ticking, silence=0.5)
    os.close(reading)
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"{", "request"),
        (b"3", "request"),
        (b'{"op": "fly"}', "request"),
        (b'{"op": "set"}', "request"),
        (b'{"op": "set", "gpu": "7", "sm": "990"}', "device"),
        (b'{"op": "set", "gpu": "0", "sm": 990}', "request"),
    ],
)
def test_a_request_that_makes_no_sense_is_answered(gpus: SimulatedGpus, tmp_path: Path, line: bytes, kind: str) -> None:
    guard = guard_over(gpus, tmp_path, Clock())
    reply = guard_process.answer(guard, line)
    assert reply is not None and reply["ok"] is False and reply["kind"] == kind
    assert guard_process.answer(guard, b"") is None and gpus.changes == 0
