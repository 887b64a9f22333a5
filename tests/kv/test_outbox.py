"""Prefill's state machine: either side first, segments in order, every end told once, nothing left over."""

from __future__ import annotations

import json
import threading
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disagg_kv.prefill.outbox import Lane, Outbox, Segment
from disagg_kv.protocol.messages import Release, Want
from tests.kv.memory import key


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _outbox(hold: float = 60, **more: Any) -> tuple[Outbox, Lane, Clock]:
    clock = Clock()
    outbox = Outbox(hold, clock=clock, **more)
    return outbox, outbox.attach(lambda: None), clock


def _next(outbox: Outbox, lane: Lane) -> Segment:
    item = outbox.next(lane, 0)
    assert isinstance(item, Segment)
    return item


def _gone(outbox: Outbox, lane: Lane) -> str:
    item = outbox.next(lane, 0)
    assert isinstance(item, bytes)
    return str(json.loads(item[5:])["reason"])


def test_wanted_before_it_is_computed() -> None:
    outbox, lane, _ = _outbox()
    outbox.want(lane, Want(key("t"), 0, 3))
    assert outbox.next(lane, 0) is None
    outbox.open(key("t"), "r", 3)
    assert outbox.next(lane, 0) is None
    outbox.progress("r", [7, 8, 9], 3, "fence")
    segment = _next(outbox, lane)
    assert (segment.first, list(segment.blocks), segment.last, segment.fence) == (0, [7, 8, 9], True, "fence")


def test_computed_before_it_is_wanted() -> None:
    outbox, lane, _ = _outbox()
    outbox.open(key("t"), "r", 3)
    outbox.progress("r", [7, 8, 9], 3, None)
    outbox.want(lane, Want(key("t"), 1, 2))
    segment = _next(outbox, lane)
    assert (segment.first, list(segment.blocks), segment.last) == (1, [8, 9], True)


def test_blocks_are_freed_when_they_are_sent_and_the_request_is_over() -> None:
    outbox, lane, _ = _outbox()
    outbox.open(key("t"), "r", 1)
    outbox.progress("r", [7], 1, None)
    outbox.finish({"r", "another"})
    assert outbox.collect() == set()
    outbox.want(lane, Want(key("t"), 0, 1))
    segment = _next(outbox, lane)
    assert outbox.collect() == set()
    outbox.sent(lane, segment, True)
    assert outbox.collect() == {"r"}
    assert outbox.collect() == set()
    assert outbox.held() == {"jobs": 0, "requests": 0, "wants": 0, "lanes": 1}


def test_a_request_that_is_not_over_is_not_named() -> None:
    outbox, lane, _ = _outbox()
    outbox.open(key("t"), "r", 1)
    outbox.progress("r", [7], 1, None)
    outbox.want(lane, Want(key("t"), 0, 1))
    outbox.sent(lane, _next(outbox, lane), True)
    assert outbox.collect() == set()
    outbox.finish({"r"})
    assert outbox.collect() == {"r"}


def test_chunks_are_sent_as_they_are_computed() -> None:
    outbox, lane, _ = _outbox()
    outbox.want(lane, Want(key("t"), 0, 4))
    outbox.open(key("t"), "r", 4)
    outbox.progress("r", [1, 2], 2, None)
    first = _next(outbox, lane)
    assert (list(first.blocks), first.last) == ([1, 2], False)
    outbox.progress("r", [1, 2, 3, 4], 4, None)
    assert outbox.next(lane, 0) is None, "one segment of a job at a time"
    outbox.sent(lane, first, True)
    second = _next(outbox, lane)
    assert (second.first, list(second.blocks), second.last) == (2, [3, 4], True)


def _finish(outbox: Outbox, name: str, blocks: int = 3) -> None:
    outbox.open(key(name), name, blocks)
    outbox.progress(name, list(range(blocks)), blocks, None)
    outbox.finish({name})


def test_the_newest_are_given_up_when_too_much_waits() -> None:
    """Decode takes its requests first come, first served: it asks for the oldest next."""
    outbox, lane, _ = _outbox(hold_blocks=9)
    for name in "abcde":
        _finish(outbox, name)
        assert outbox.collect() == ({name} if name in "de" else set())
    assert outbox.take_unfetched() == {"too much KV waits to be fetched": 2} and not outbox.take_unfetched()
    outbox.want(lane, Want(key("d"), 0, 3))
    assert _gone(outbox, lane) == "too much KV waits to be fetched"
    outbox.want(lane, Want(key("a"), 0, 3))
    outbox.sent(lane, _next(outbox, lane), True)
    assert outbox.collect() == {"a"}
    _finish(outbox, "f")
    assert outbox.collect() == set(), "there is capacity again"


def test_what_decode_has_asked_for_is_not_given_up_and_does_not_count() -> None:
    outbox, lane, _ = _outbox(hold_blocks=3)
    for name in "ab":
        outbox.want(lane, Want(key(name), 0, 3))
        _finish(outbox, name)
    sending = _next(outbox, lane)
    _finish(outbox, "c")
    assert outbox.collect() == set()
    _finish(outbox, "d")
    assert outbox.collect() == {"d"}
    for segment in (sending, _next(outbox, lane)):
        outbox.sent(lane, segment, True)
    assert outbox.collect() == {"a", "b"}


def test_a_prompt_that_is_still_computed_is_not_given_up() -> None:
    outbox, _, _ = _outbox(hold_blocks=1)
    outbox.open(key("t"), "r", 5)
    outbox.progress("r", [1, 2], 2, None)
    assert outbox.collect() == set() and outbox.held()["jobs"] == 1


def test_a_message_is_posted_once() -> None:
    """Whatever a peer asks again and again takes no memory."""
    outbox, lane, _ = _outbox()
    for _ in range(5):
        outbox.post(lane, b"x")
    assert (outbox.next(lane, 0), outbox.next(lane, 0)) == (b"x", None)
    outbox.detach(lane)
    outbox.post(lane, b"x")
    assert not lane.messages


def test_a_preempted_prompt_goes_on_where_it_was() -> None:
    outbox, lane, _ = _outbox()
    outbox.want(lane, Want(key("t"), 0, 3))
    outbox.open(key("t"), "r", 3)
    outbox.progress("r", [1, 2], 2, None)
    outbox.sent(lane, _next(outbox, lane), True)
    assert outbox.suspend("r", 1)
    outbox.progress("r", [11, 12], 1, None)
    assert outbox.next(lane, 0) is None
    outbox.progress("r", [11, 12, 13], 3, None)
    segment = _next(outbox, lane)
    assert (segment.first, list(segment.blocks), segment.last) == (2, [13], True)


def test_preemption_waits_for_who_reads_the_blocks() -> None:
    outbox, lane, _ = _outbox()
    outbox.want(lane, Want(key("t"), 0, 2))
    outbox.open(key("t"), "r", 2)
    outbox.progress("r", [1, 2], 2, None)
    segment = _next(outbox, lane)
    result: list[bool] = []
    waiting = threading.Thread(target=lambda: result.append(outbox.suspend("r", 20)))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    outbox.sent(lane, segment, True)
    waiting.join(20)
    assert result == [True]


def test_preemption_breaks_a_lane_that_does_not_end() -> None:
    outbox, _, _ = _outbox()
    lanes: list[Lane] = []
    segments: list[Segment] = []

    def kill() -> None:
        outbox.sent(lanes[0], segments[0], False)
        outbox.detach(lanes[0])

    lanes.append(outbox.attach(kill))
    outbox.want(lanes[0], Want(key("t"), 0, 2))
    outbox.open(key("t"), "r", 2)
    outbox.progress("r", [1, 2], 2, None)
    segments.append(_next(outbox, lanes[0]))
    assert not outbox.suspend("r", 0.01)
    assert not segments[0].job.reading


def test_an_aborted_request_is_gone_for_who_waits_and_who_comes_later() -> None:
    outbox, lane, _ = _outbox()
    outbox.want(lane, Want(key("t"), 0, 2))
    outbox.open(key("t"), "r", 2)
    outbox.drop("r", "aborted")
    assert _gone(outbox, lane) == "aborted"
    outbox.want(lane, Want(key("t"), 0, 2))
    assert _gone(outbox, lane) == "aborted"
    outbox.finish({"r"})
    assert outbox.collect() == {"r"}


def test_aborted_in_the_middle_of_a_segment() -> None:
    outbox, lane, _ = _outbox()
    outbox.want(lane, Want(key("t"), 0, 2))
    outbox.open(key("t"), "r", 2)
    outbox.progress("r", [1], 1, None)
    segment = _next(outbox, lane)
    outbox.drop("r", "aborted")
    outbox.finish({"r"})
    assert outbox.collect() == set(), "the blocks are being read"
    outbox.sent(lane, segment, True)
    assert outbox.collect() == {"r"}
    assert _gone(outbox, lane) == "aborted"


def test_what_nobody_fetches_expires() -> None:
    outbox, lane, clock = _outbox(hold=10)
    outbox.open(key("t"), "r", 1)
    clock.now = 100
    outbox.progress("r", [1], 1, None)
    outbox.finish({"r"})
    clock.now = 110
    assert outbox.collect() == set()
    clock.now = 110.1
    assert outbox.collect() == {"r"}
    outbox.want(lane, Want(key("t"), 0, 1))
    assert _gone(outbox, lane) == "expired"


def test_a_prompt_that_is_not_computed_yet_does_not_expire() -> None:
    outbox, lane, clock = _outbox(hold=10)
    outbox.open(key("t"), "r", 2)
    outbox.progress("r", [1], 1, None)
    clock.now = 1000
    outbox.collect()
    outbox.progress("r", [1, 2], 2, None)
    outbox.want(lane, Want(key("t"), 0, 2))
    assert _next(outbox, lane).last


def test_the_proxy_releases_a_transfer_before_during_and_after() -> None:
    outbox, lane, _ = _outbox()
    outbox.want(lane, Want(key("t", 1), 0, 1))
    outbox.open(key("t", 2), "r2", 1)
    outbox.release(None, Release("t"))
    assert _gone(outbox, lane) == "released"
    outbox.open(key("t", 3), "r3", 1)
    for prompt in (2, 3, 4):
        outbox.want(lane, Want(key("t", prompt), 0, 1))
        assert _gone(outbox, lane) == "released"
    outbox.finish({"r2", "r3"})
    assert outbox.collect() == {"r2", "r3"}


def test_decode_releases_what_it_does_not_need() -> None:
    outbox, lane, _ = _outbox()
    outbox.open(key("t"), "r", 1)
    outbox.progress("r", [1], 1, None)
    outbox.release(lane, Release("t", key("t")))
    outbox.finish({"r"})
    assert outbox.collect() == {"r"}


def test_what_decode_has_released_before_is_not_held() -> None:
    """Decode often schedules a request before prefill does, and may find the prompt in its own prefix cache."""
    outbox, lane, _ = _outbox()
    outbox.release(lane, Release("t", key("t")))
    outbox.open(key("t"), "r", 1)
    outbox.progress("r", [1], 1, None)
    outbox.finish({"r"})
    assert outbox.collect() == {"r"}


def test_a_lane_cannot_release_what_another_one_waits_for() -> None:
    outbox, lane, _ = _outbox()
    other = outbox.attach(lambda: None)
    outbox.want(lane, Want(key("t"), 0, 1))
    outbox.open(key("t"), "r", 1)
    outbox.release(other, Release("t", key("t")))
    outbox.progress("r", [1], 1, None)
    assert _next(outbox, lane).last


def test_a_dead_decode_leaves_no_kv_behind() -> None:
    """What it waited for is computed by decode, or asked for under another transfer id."""
    outbox, lane, _ = _outbox()
    for name in ("begun", "later", "not wanted"):
        if name != "not wanted":
            outbox.want(lane, Want(key(name), 0, 2))
        if name != "later":
            outbox.open(key(name), name, 2)
            outbox.progress(name, [1, 2], 1, None)
    outbox.sent(lane, _next(outbox, lane), False)
    outbox.detach(lane)
    assert outbox.next(lane, 0) is None
    outbox.open(key("later"), "later", 2)
    for name in ("begun", "later", "not wanted"):
        outbox.progress(name, [1, 2], 2, None)
    outbox.finish({"begun", "later", "not wanted"})
    assert outbox.collect() == {"begun", "later"}
    other = outbox.attach(lambda: None)
    outbox.want(other, Want(key("not wanted"), 0, 2))
    assert list(_next(outbox, other).blocks) == [1, 2]


def test_a_second_want_is_refused() -> None:
    outbox, lane, _ = _outbox()
    other = outbox.attach(lambda: None)
    outbox.want(lane, Want(key("t"), 0, 1))
    outbox.want(other, Want(key("t"), 0, 1))
    assert _gone(outbox, other) == "wanted twice"


def test_blocks_that_are_not_those_of_the_prompt_are_refused() -> None:
    outbox, lane, _ = _outbox()
    outbox.open(key("a"), "a", 2)
    outbox.want(lane, Want(key("a"), 0, 3))
    assert "2 blocks, not 3" in _gone(outbox, lane)
    outbox.want(lane, Want(key("b"), 0, 3))
    outbox.open(key("b"), "b", 2)
    assert "2 blocks, not 3" in _gone(outbox, lane)
    _assert_freed(outbox, "a", "b")


def test_another_adapter_under_the_same_name_is_refused() -> None:
    outbox, lane, _ = _outbox()
    outbox.open(key("a"), "a", 2, "x")
    outbox.want(lane, Want(key("a"), 0, 2, "y"))
    assert "adapter" in _gone(outbox, lane)
    outbox.want(lane, Want(key("b"), 0, 2))
    outbox.open(key("b"), "b", 2, "x")
    assert "adapter" in _gone(outbox, lane)
    _assert_freed(outbox, "a", "b")


def _assert_freed(outbox: Outbox, *requests: str) -> None:
    """Nobody will ask for them again, so they are not held until they expire."""
    for request in requests:
        outbox.progress(request, [1, 2], 2, None)
    outbox.finish(requests)
    assert outbox.collect() == set(requests)


def test_waiting_requests_are_bounded() -> None:
    outbox, lane, _ = _outbox(max_waiting=2)
    for name in "abc":
        outbox.want(lane, Want(key(name), 0, 1))
    assert _gone(outbox, lane) == "too many requests wait"
    assert outbox.held()["wants"] == 2
    outbox.open(key("c"), "c", 1)
    outbox.progress("c", [1], 1, None)
    outbox.finish({"c"})
    assert outbox.collect() == {"c"}, "nobody asks for it again"


class Machine(RuleBasedStateMachine):
    """Any order of events: blocks are read only while they are held, and in the end nothing is left."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.outbox = Outbox(50, max_waiting=3, clock=self.clock)
        self.lanes = [self.outbox.attach(lambda: None) for _ in range(2)]
        self.opened = 0
        self.unfinished: dict[str, int] = {}
        self.freed: set[str] = set()
        self.finished: set[str] = set()
        self.reading: list[tuple[Lane, Segment]] = []
        self.messages = 0

    @rule(name=st.integers(0, 3), total=st.integers(1, 3))
    def open(self, name: int, total: int) -> None:
        if any(segment.key == key(f"t{name}") for _, segment in self.reading):
            return
        request = f"r{self.opened}"
        self.opened += 1
        for other in [other for other, which in self.unfinished.items() if which == name]:
            self.outbox.drop(other, "again")
            self.outbox.finish({other})
            self.finished.add(other)
            del self.unfinished[other]
        self.outbox.open(key(f"t{name}"), request, total)
        self.unfinished[request] = name

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data(), ready=st.integers(0, 3))
    def progress(self, data: Any, ready: int) -> None:
        self.outbox.progress(data.draw(st.sampled_from(sorted(self.unfinished))), [4, 5, 6], ready, None)

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data(), abort=st.booleans())
    def finish(self, data: Any, abort: bool) -> None:
        request = data.draw(st.sampled_from(sorted(self.unfinished)))
        del self.unfinished[request]
        if abort:
            self.outbox.drop(request, "aborted")
        self.outbox.finish({request})
        self.finished.add(request)

    @rule(lane=st.integers(0, 1), name=st.integers(0, 3), first=st.integers(0, 2), count=st.integers(1, 3))
    def want(self, lane: int, name: int, first: int, count: int) -> None:
        self.outbox.want(self.lanes[lane], Want(key(f"t{name}"), first, count))

    @rule(lane=st.integers(0, 1), name=st.integers(0, 3))
    def release(self, lane: int, name: int) -> None:
        self.outbox.release(self.lanes[lane], Release(f"t{name}", key(f"t{name}")))

    @rule(lane=st.integers(0, 1))
    def next(self, lane: int) -> None:
        if any(busy is self.lanes[lane] for busy, _ in self.reading):
            return
        item = self.outbox.next(self.lanes[lane], 0)
        if isinstance(item, Segment):
            assert item.job.request not in self.freed
            self.reading.append((self.lanes[lane], item))

    @precondition(lambda self: self.reading)
    @rule(ok=st.booleans())
    def sent(self, ok: bool) -> None:
        lane, segment = self.reading.pop()
        self.outbox.sent(lane, segment, ok)
        if not ok:
            self.detach(self.lanes.index(lane))

    @rule(lane=st.integers(0, 1))
    def detach(self, lane: int) -> None:
        if not any(busy is self.lanes[lane] for busy, _ in self.reading):
            self.outbox.detach(self.lanes[lane])
            self.lanes[lane] = self.outbox.attach(lambda: None)

    @rule(seconds=st.sampled_from([1, 60]))
    def collect(self, seconds: int) -> None:
        self.clock.now += seconds
        freed = self.outbox.collect()
        assert freed <= self.finished and not freed & self.freed
        assert not freed & {segment.job.request for _, segment in self.reading}
        self.freed |= freed

    @invariant()
    def bounded(self) -> None:
        held = self.outbox.held()
        assert held["jobs"] <= 4
        assert held["wants"] <= 3 + held["jobs"]

    def teardown(self) -> None:
        while self.reading:
            self.sent(True)
        for request in list(self.unfinished):
            self.outbox.drop(request, "end")
            self.outbox.finish({request})
            self.finished.add(request)
        for lane in self.lanes:
            self.outbox.detach(lane)
        self.clock.now += 100
        self.freed |= self.outbox.collect()
        assert self.freed == self.finished
        assert self.outbox.held() == {"jobs": 0, "requests": 0, "wants": 0, "lanes": 0}


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
