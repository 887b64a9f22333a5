"""What the supervisor decides, with a clock and a machine of the test's own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from disagg_machine import messages, supervise
from disagg_machine.layout import Layout, Place
from disagg_machine.parts import ALIVE, DEAD, Part
from disagg_machine.proxy_view import Engine, ProxyView
from disagg_machine.supervisor import (
    DECISIONS,
    LOOK,
    LOOK_AGAIN_AFTER_SILENCE,
    PORT_WAIT,
    SETTLED,
    Action,
    Condition,
    Rules,
    Supervisor,
    Watch,
    back_off,
)

PROXY = Place("proxy", "proxy", 1, 2)
PREFILLS = [Place("prefill1", "prefill", 10, 11, ("0",)), Place("prefill2", "prefill", 12, 13, ("1",))]
DECODES = [Place("decode1", "decode", 20, 21, ("2",)), Place("decode2", "decode", 22, 23, ("3",))]
LAYOUT = Layout((PROXY, *PREFILLS, *DECODES))
STARTED = 1000
"""When everything was started, in seconds since 1970."""


@dataclass
class FakeWorld:
    """Parts that live and die as a test says; ``did`` is what the supervisor did."""

    time: float = 0.0
    parts: dict[str, Part] = field(default_factory=dict)
    engines: dict[int, Engine] | None = None
    taken: set[int] = field(default_factory=set)
    loading: set[str] = field(default_factory=set)
    busy: bool = False
    did: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    notes: dict[str, tuple[str, str]] = field(default_factory=dict)
    asked: int = 0
    locked: bool = False
    pids: itertools.count[int] = field(default_factory=lambda: itertools.count(500))

    def __post_init__(self) -> None:
        for pid, place in enumerate(LAYOUT.parts, 100):
            self.parts[place.name] = running(place, pid)
        self.serve(5)

    def serve(self, requests: int, **states: tuple[str, str]) -> None:
        """Each engine has had ``requests``; ``states``: state and reason of those that the proxy wants restarted."""
        self.engines = {}
        for place in LAYOUT.engines:
            state, reason = states.get(place.name, ("ready", "-"))
            self.engines[place.http] = Engine(requests, 0, state, reason, place.name in states)

    def die(self, name: str) -> int:
        self.parts[name] = replace(self.parts[name], state=DEAD)
        return self.parts[name].pid

    def clock(self) -> float:
        return self.time

    def now(self) -> float:
        return STARTED + self.time

    def part(self, name: str) -> Part | None:
        return self.parts.get(name)

    def take_lock(self) -> bool:
        assert not self.locked
        self.locked = not self.busy
        return self.locked

    def release_lock(self) -> None:
        assert self.locked
        self.locked = False

    def ask_proxy(self) -> ProxyView:
        self.asked += 1
        return ProxyView() if self.engines is None else ProxyView(self.engines, answered=True)

    def listens(self, port: int) -> bool:
        return port in self.taken

    def holder(self, port: int) -> str:
        return f"held by {port}"

    def ready(self, place: Place) -> bool:
        return place.name not in self.loading

    def end(self, parts: Sequence[tuple[Place, Part | None]]) -> None:
        assert self.locked
        self.did.append("end " + " ".join(place.name for place, _ in parts))
        for place, part in parts:
            connector = part.get("connector") if part else ""
            self.parts[place.name] = Part(place.name, 0, DEAD, {"pid": "0", "connector": connector})

    def start(self, place: Place, view: ProxyView) -> int:
        assert self.locked
        self.did.append(f"start {place.name}")
        pid = next(self.pids)
        self.parts[place.name] = running(place, pid, since=int(self.now()), served=view.requests(place.http) or 0)
        return pid

    def say(self, line: str) -> None:
        self.said.append(line)

    def show_log(self, name: str) -> None:
        self.said.append(f"log of {name}")

    def note(self, name: str, state: str, reason: str = "") -> None:
        self.notes[name] = (state, reason)


def running(place: Place, pid: int, since: int = STARTED, served: int = 0, **more: str) -> Part:
    fields = {"pid": str(pid), "since": str(since), "served": str(served), "connector": "p2p_nccl", **more}
    return Part(place.name, pid, ALIVE, fields)


@pytest.fixture
def world() -> FakeWorld:
    messages.use("en")
    return FakeWorld()


def supervisor(world: FakeWorld, limit: int = 3, shared: bool = False, layout: Layout = LAYOUT) -> Supervisor:
    return Supervisor(layout, Rules(limit, window=600, first_wait=1, engines_share_memory=shared), world)


def run(world: FakeWorld, one: Supervisor, seconds: float, tick: float = 0.5) -> None:
    """The supervisor for that long."""
    end = world.time + seconds
    while world.time < end:
        one.step()
        world.time += tick


# -- the table


def test_every_case_is_decided() -> None:
    assert set(DECISIONS) == set(itertools.product(Condition, Watch))
    assert [case for case, action in DECISIONS.items() if action is Action.FALL] == [(Condition.GONE, Watch.QUIET)]
    assert [case for case, action in DECISIONS.items() if action is Action.START] == [(Condition.GONE, Watch.WAITING)]


@pytest.mark.parametrize(
    ("falls", "wait"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, 32), (8, 32), (99, 32)]
)
def test_waits_double(falls: int, wait: float) -> None:
    assert back_off(falls, 0.5) == wait


def test_no_wait_is_longer_than_a_minute() -> None:
    assert back_off(7, 1) == 60 and back_off(1, 400) == 60


# -- a quiet machine


def test_a_quiet_machine_takes_no_lock_and_asks_every_other_second(world: FakeWorld) -> None:
    world.busy = True
    run(world, supervisor(world), 20)
    assert world.asked == 20 / LOOK and world.did == [] and world.said == []


def test_a_proxy_that_hangs_is_asked_less_often(world: FakeWorld) -> None:
    world.engines = None
    run(world, supervisor(world), 60)
    assert world.asked == 60 / LOOK_AGAIN_AFTER_SILENCE


def test_what_cannot_be_done_now_is_tried_again(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    one = supervisor(world)
    world.die("proxy")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as change:
        change.setattr(world, "end", full)
        supervise.attempt(one.step, world.say)
        assert world.said == ["cannot act now: [Errno 28] No space left on device; trying again"]
    run(world, one, 5)
    assert world.did == ["end proxy", "start proxy"] and not world.locked


def test_without_engines_the_proxy_is_not_asked(world: FakeWorld) -> None:
    world.parts = {"proxy": world.parts["proxy"]}
    run(world, supervisor(world), 20)
    assert world.asked == 0


# -- what dies


@pytest.mark.parametrize("name", ["proxy", "prefill1"])
def test_proxy_and_prefill_come_back_alone(world: FakeWorld, name: str) -> None:
    one = supervisor(world)
    one.step()
    pid = world.die(name)
    one.step()
    assert world.did == [f"end {name}"] and world.notes[name] == ("waiting", f"PID {pid} died")
    assert world.said == [f"{name} (PID {pid}) died; restart in 1.0 s (death 1, limit 3)"]
    world.time += 0.9
    one.step()
    assert world.did == [f"end {name}"]
    world.time += 0.2
    one.step()
    assert world.did == [f"end {name}", f"start {name}"] and world.notes[name] == ("running", "")
    assert world.said[-1] == f"{name} started again, PID 500"


def test_a_decode_takes_the_prefills_with_it_that_have_sent_to_it(world: FakeWorld) -> None:
    pids = [world.parts[place.name].pid for place in PREFILLS]
    world.die("decode2")
    run(world, supervisor(world), 2)
    assert world.did == ["end decode2 prefill1 prefill2", "start prefill1", "start prefill2", "start decode2"]
    for place, pid in zip(PREFILLS, pids, strict=True):
        assert f"{place.name} (PID {pid}) has sent KV to decode2 and would stay frozen: restarted" in world.said
        assert world.notes[place.name][0] == "running"


@pytest.mark.parametrize(
    ("requests", "connector", "asked"), [(0, "p2p_nccl", True), (5, "own", False), (0, "own", False)]
)
def test_prefills_that_are_not_tied_stay(world: FakeWorld, requests: int, connector: str, asked: bool) -> None:
    """Nothing was sent, or the connector connects anew: then the proxy is not even asked before the decode ends."""
    world.serve(requests)
    for place in PREFILLS:
        world.parts[place.name] = running(place, world.parts[place.name].pid, connector=connector)
    one = supervisor(world)
    one.step()
    before = world.asked
    world.die("decode1")
    one.step()
    assert (world.asked > before) is asked
    run(world, one, 2)
    assert world.did == ["end decode1", "start decode1"]


def test_a_proxy_that_says_nothing_ties_all_prefills(world: FakeWorld) -> None:
    world.engines = None
    world.die("decode1")
    run(world, supervisor(world), 2)
    assert world.did[0] == "end decode1 prefill1 prefill2"


def test_a_prefill_in_a_terminal_is_named_once(world: FakeWorld) -> None:
    world.parts["prefill1"] = running(PREFILLS[0], 100, mode="foreground")
    world.parts.pop("prefill2")
    one = supervisor(world)
    for name in ("decode1", "decode2"):
        world.die(name)
        run(world, one, 3)
    assert world.did == ["end decode1", "start decode1", "end decode2", "start decode2"]
    assert len([line for line in world.said if line.startswith("prefill1 (PID 100) has sent KV to decode1")]) == 1


def test_a_part_that_was_stopped_stays_stopped(world: FakeWorld) -> None:
    one = supervisor(world)
    world.die("proxy")
    one.step()
    world.parts.pop("proxy")
    run(world, one, 30)
    assert world.did == ["end proxy"]


def test_a_terminal_sees_to_its_own_part(world: FakeWorld) -> None:
    world.parts["decode1"] = replace(running(DECODES[0], 7, mode="foreground"), state=DEAD)
    run(world, supervisor(world), 30)
    assert world.did == []


def test_deaths_while_another_command_is_at_work_are_its_doing(world: FakeWorld) -> None:
    one = supervisor(world)
    world.busy = True
    world.die("proxy")
    run(world, one, 5)
    assert world.did == []
    world.parts["proxy"] = running(PROXY, 9)
    world.busy = False
    run(world, one, 5)
    assert world.did == [] and world.said == []


def test_too_many_falls_and_a_fresh_start(world: FakeWorld) -> None:
    one = supervisor(world, limit=2)
    for _ in range(3):
        world.die("prefill1")
        run(world, one, 10)
    assert world.did == ["end prefill1", "start prefill1"] * 2 + ["end prefill1"]
    assert "prefill1 died or froze 3 times within 600 s: given up. The end of its log:" in world.said
    assert world.said[-1] == "log of prefill1"
    assert world.notes["prefill1"] == ("given-up", "gone 3 times, at last: PID 501 died")
    run(world, one, 700)
    assert world.did[-1] == "end prefill1", "given up for good"
    world.parts["prefill1"] = running(PREFILLS[0], 9)
    run(world, one, 1)
    world.die("prefill1")
    run(world, one, 2)
    assert world.said[-2] == "prefill1 (PID 9) died; restart in 1.0 s (death 1, limit 2)"


def test_falls_are_forgotten_after_the_window(world: FakeWorld) -> None:
    one = supervisor(world, limit=1)
    for death in range(4):
        world.die("proxy")
        run(world, one, 601)
        assert world.did[-1] == "start proxy", death
    assert not any("given up" in line for line in world.said)


def test_a_taken_port_is_waited_for(world: FakeWorld) -> None:
    one = supervisor(world)
    world.taken = {PREFILLS[0].ports[1]}
    world.die("prefill1")
    run(world, one, 3)
    assert world.did == ["end prefill1"]
    assert world.said[-1] == "prefill1 waits: port 11 is held by 11"
    said = len(world.said)
    run(world, one, PORT_WAIT - 2)
    assert len(world.said) == said, "said once per look"
    world.taken = set()
    run(world, one, PORT_WAIT)
    assert world.did[-1] == "start prefill1"


@pytest.mark.parametrize("shared", [True, False])
def test_engines_of_vllm_on_one_gpu_start_one_after_the_other(world: FakeWorld, shared: bool) -> None:
    layout = Layout((PROXY, *(replace(place, gpus=("0",)) for place in PREFILLS)))
    one = supervisor(world, shared=shared, layout=layout)
    for place in PREFILLS:
        world.die(place.name)
    world.loading = {"prefill1"}
    run(world, one, 5)
    assert ("start prefill2" in world.did) is not shared
    world.loading = set()
    run(world, one, 1)
    assert world.did[-2:] == ["start prefill1", "start prefill2"]


# -- what the proxy wants restarted

FROZEN = ("frozen", "no token for 41 s")


def test_a_frozen_decode_is_ended_with_its_prefills(world: FakeWorld) -> None:
    one = supervisor(world)
    one.step()
    world.serve(5, decode1=FROZEN)
    pid = world.parts["decode1"].pid
    run(world, one, 3)
    assert world.did[0] == "end decode1 prefill1 prefill2"
    assert world.said[0] == f"decode1 (PID {pid}) is frozen, says the proxy (no token for 41 s), and is ended"
    assert world.said[1].startswith(f"decode1 (PID {pid}) was ended; restart in 1.0 s")
    assert {name for name, (state, _) in world.notes.items() if state in ("waiting", "running")} == {
        "decode1", "prefill1", "prefill2",
    }  # fmt: skip
    run(world, one, 30)
    assert world.did.count("start decode1") == 1, "the wish that stays for a while is about the process before"


def test_a_prefill_that_goes_with_its_decode_is_no_case_of_its_own(world: FakeWorld) -> None:
    one = supervisor(world)
    one.step()
    world.serve(5, decode1=FROZEN, prefill1=FROZEN)
    run(world, one, 3)
    assert [line for line in world.said if line.startswith("prefill1") and "is frozen" in line] == []


def test_a_wish_from_before_the_first_look_counts_after_a_minute(world: FakeWorld) -> None:
    world.serve(5, prefill1=FROZEN)
    one = supervisor(world)
    world.taken = {PREFILLS[0].http}
    run(world, one, SETTLED)
    assert world.did == []
    run(world, one, 2 * LOOK)
    assert world.did == ["end prefill1"]


def test_one_that_does_not_listen_still_loads(world: FakeWorld) -> None:
    world.serve(5, prefill1=FROZEN)
    run(world, supervisor(world), 3 * SETTLED)
    assert world.did == []


def test_a_frozen_engine_in_a_terminal_is_named_once(world: FakeWorld) -> None:
    world.parts["prefill1"] = running(PREFILLS[0], 7, mode="foreground")
    one = supervisor(world)
    one.step()
    world.serve(5, prefill1=FROZEN)
    run(world, one, 30)
    assert world.did == [] and len(world.said) == 1 and "runs in a terminal of its own" in world.said[0]


def test_a_wish_waits_for_another_command(world: FakeWorld) -> None:
    one = supervisor(world)
    one.step()
    world.serve(5, prefill1=FROZEN)
    world.busy = True
    run(world, one, 10)
    assert world.did == []
    world.busy = False
    run(world, one, 2 * LOOK)
    assert world.did == ["end prefill1", "start prefill1"]
