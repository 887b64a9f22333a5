"""Prefill's state machine: either side first, segments in order, every end notified once, no leaks."""

from __future__ import annotations

import json
import threading
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disagg_kv.outcomes import reason_label
from disagg_kv.prefill.send_queue import DecodePeer, Segment, SendQueue
from disagg_kv.protocol.messages import Release, Want
from tests.kv.memory import key


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _send_queue(hold: float = 60, **more: Any) -> tuple[SendQueue, DecodePeer, Clock]:
    clock = Clock()
    send_queue = SendQueue(hold, clock=clock, **more)
    return send_queue, send_queue.attach(lambda: None), clock


def _next(send_queue: SendQueue, peer: DecodePeer) -> Segment:
    item = send_queue.next(peer, 0)
    assert isinstance(item, Segment)
    return item


def _gone(send_queue: SendQueue, peer: DecodePeer) -> str:
    item = send_queue.next(peer, 0)
    assert isinstance(item, bytes)
    return str(json.loads(item[5:])["reason"])


def test_wanted_before_it_is_computed() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.on_want(peer, Want(key("t"), 0, 3))
    assert send_queue.next(peer, 0) is None
    send_queue.open(key("t"), "r", 3)
    assert send_queue.next(peer, 0) is None
    send_queue.progress("r", [7, 8, 9], 3, "fence")
    segment = _next(send_queue, peer)
    assert (segment.first, list(segment.blocks), segment.last, segment.fence) == (0, [7, 8, 9], True, "fence")


def test_computed_before_it_is_wanted() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.open(key("t"), "r", 3)
    send_queue.progress("r", [7, 8, 9], 3, None)
    send_queue.on_want(peer, Want(key("t"), 1, 2))
    segment = _next(send_queue, peer)
    assert (segment.first, list(segment.blocks), segment.last) == (1, [8, 9], True)


def _with_tails(send_queue: SendQueue, ready: int = 9) -> None:
    """Three blocks that every token needs, and tails of four and two."""
    send_queue.open(key("t"), "r", 9, "", (4, 2))
    send_queue.progress("r", [1, 2, 3, 11, 12, 13, 14, 21, 22][:ready], ready, None)


def test_a_decode_that_has_the_begin_of_a_tail_gets_its_end() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.on_want(peer, Want(key("t"), 1, 5, "", (2, 1)))
    _with_tails(send_queue, 2)
    first = _next(send_queue, peer)
    assert (first.first, list(first.blocks), first.last) == (1, [2], False)
    send_queue.on_sent(peer, first, True)
    _with_tails(send_queue)
    second = _next(send_queue, peer)
    assert (second.first, list(second.blocks), second.last) == (2, [3, 13, 14, 22], True)


def test_whole_and_empty_tails() -> None:
    for tails, blocks in (((4, 2), [1, 2, 3, 11, 12, 13, 14, 21, 22]), ((0, 2), [1, 2, 3, 21, 22])):
        send_queue, peer, _ = _send_queue()
        _with_tails(send_queue)
        send_queue.on_want(peer, Want(key("t"), 0, len(blocks), "", tails))
        segment = _next(send_queue, peer)
        assert list(segment.blocks) == blocks and segment.last
        send_queue.finish({"r"})
        send_queue.on_sent(peer, segment, True)
        assert send_queue.collect() == {"r"}


def test_tails_that_prefill_does_not_have_are_refused() -> None:
    for want in (Want(key("t"), 0, 9), Want(key("t"), 0, 9, "", (6,)), Want(key("t"), 0, 10, "", (5, 2))):
        send_queue, peer, _ = _send_queue()
        _with_tails(send_queue)
        send_queue.on_want(peer, want)
        assert reason_label(_gone(send_queue, peer)) == "mismatch"


def test_blocks_are_freed_when_they_are_sent_and_the_request_is_over() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.open(key("t"), "r", 1)
    send_queue.progress("r", [7], 1, None)
    send_queue.finish({"r", "another"})
    assert send_queue.collect() == set()
    send_queue.on_want(peer, Want(key("t"), 0, 1))
    segment = _next(send_queue, peer)
    assert send_queue.collect() == set()
    send_queue.on_sent(peer, segment, True)
    assert send_queue.collect() == {"r"}
    assert send_queue.collect() == set()
    assert send_queue.counts() == {"jobs": 0, "requests": 0, "wants": 0, "peers": 1}


def test_a_request_that_is_not_over_is_not_named() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.open(key("t"), "r", 1)
    send_queue.progress("r", [7], 1, None)
    send_queue.on_want(peer, Want(key("t"), 0, 1))
    send_queue.on_sent(peer, _next(send_queue, peer), True)
    assert send_queue.collect() == set()
    send_queue.finish({"r"})
    assert send_queue.collect() == {"r"}


def test_chunks_are_sent_as_they_are_computed() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.on_want(peer, Want(key("t"), 0, 4))
    send_queue.open(key("t"), "r", 4)
    send_queue.progress("r", [1, 2], 2, None)
    first = _next(send_queue, peer)
    assert (list(first.blocks), first.last) == ([1, 2], False)
    send_queue.progress("r", [1, 2, 3, 4], 4, None)
    assert send_queue.next(peer, 0) is None, "one segment of a job at a time"
    send_queue.on_sent(peer, first, True)
    second = _next(send_queue, peer)
    assert (second.first, list(second.blocks), second.last) == (2, [3, 4], True)


def _finish(send_queue: SendQueue, name: str, blocks: int = 3) -> None:
    send_queue.open(key(name), name, blocks)
    send_queue.progress(name, list(range(blocks)), blocks, None)
    send_queue.finish({name})


def test_the_newest_are_given_up_when_too_much_waits() -> None:
    """Decode takes its requests first come, first served: it asks for the oldest next."""
    send_queue, peer, _ = _send_queue(hold_blocks=9)
    for name in "abcde":
        _finish(send_queue, name)
        assert send_queue.collect() == ({name} if name in "de" else set())
    assert send_queue.take_unfetched() == {"too much KV waits to be fetched": 2} and not send_queue.take_unfetched()
    send_queue.on_want(peer, Want(key("d"), 0, 3))
    assert _gone(send_queue, peer) == "too much KV waits to be fetched"
    send_queue.on_want(peer, Want(key("a"), 0, 3))
    send_queue.on_sent(peer, _next(send_queue, peer), True)
    assert send_queue.collect() == {"a"}
    _finish(send_queue, "f")
    assert send_queue.collect() == set(), "there is capacity again"


def test_requested_kv_is_not_given_up_and_does_not_count() -> None:
    send_queue, peer, _ = _send_queue(hold_blocks=3)
    for name in "ab":
        send_queue.on_want(peer, Want(key(name), 0, 3))
        _finish(send_queue, name)
    sending = _next(send_queue, peer)
    _finish(send_queue, "c")
    assert send_queue.collect() == set()
    _finish(send_queue, "d")
    assert send_queue.collect() == {"d"}
    for segment in (sending, _next(send_queue, peer)):
        send_queue.on_sent(peer, segment, True)
    assert send_queue.collect() == {"a", "b"}


def test_a_prompt_that_is_still_computed_is_not_given_up() -> None:
    send_queue, _, _ = _send_queue(hold_blocks=1)
    send_queue.open(key("t"), "r", 5)
    send_queue.progress("r", [1, 2], 2, None)
    assert send_queue.collect() == set() and send_queue.counts()["jobs"] == 1


def test_a_message_is_posted_once() -> None:
    """Whatever a peer asks again and again takes no memory."""
    send_queue, peer, _ = _send_queue()
    for _ in range(5):
        send_queue.enqueue(peer, b"x")
    assert (send_queue.next(peer, 0), send_queue.next(peer, 0)) == (b"x", None)
    send_queue.detach(peer)
    send_queue.enqueue(peer, b"x")
    assert not peer.messages


def test_a_preempted_prompt_goes_on_where_it_was() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.on_want(peer, Want(key("t"), 0, 3))
    send_queue.open(key("t"), "r", 3)
    send_queue.progress("r", [1, 2], 2, None)
    send_queue.on_sent(peer, _next(send_queue, peer), True)
    assert send_queue.suspend("r", 1)
    send_queue.progress("r", [11, 12], 1, None)
    assert send_queue.next(peer, 0) is None
    send_queue.progress("r", [11, 12, 13], 3, None)
    segment = _next(send_queue, peer)
    assert (segment.first, list(segment.blocks), segment.last) == (2, [13], True)


def test_preemption_waits_for_who_reads_the_blocks() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.on_want(peer, Want(key("t"), 0, 2))
    send_queue.open(key("t"), "r", 2)
    send_queue.progress("r", [1, 2], 2, None)
    segment = _next(send_queue, peer)
    result: list[bool] = []
    waiting = threading.Thread(target=lambda: result.append(send_queue.suspend("r", 20)))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    send_queue.on_sent(peer, segment, True)
    waiting.join(20)
    assert result == [True]


def test_preemption_breaks_a_lane_that_does_not_end() -> None:
    send_queue, _, _ = _send_queue()
    peers: list[DecodePeer] = []
    segments: list[Segment] = []

    def kill() -> None:
        send_queue.on_sent(peers[0], segments[0], False)
        send_queue.detach(peers[0])

    peers.append(send_queue.attach(kill))
    send_queue.on_want(peers[0], Want(key("t"), 0, 2))
    send_queue.open(key("t"), "r", 2)
    send_queue.progress("r", [1, 2], 2, None)
    segments.append(_next(send_queue, peers[0]))
    assert not send_queue.suspend("r", 0.01)
    assert not segments[0].job.reading


def test_an_aborted_request_is_gone_for_who_waits_and_who_comes_later() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.on_want(peer, Want(key("t"), 0, 2))
    send_queue.open(key("t"), "r", 2)
    send_queue.drop("r", "aborted")
    assert _gone(send_queue, peer) == "aborted"
    send_queue.on_want(peer, Want(key("t"), 0, 2))
    assert _gone(send_queue, peer) == "aborted"
    send_queue.finish({"r"})
    assert send_queue.collect() == {"r"}


def test_aborted_in_the_middle_of_a_segment() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.on_want(peer, Want(key("t"), 0, 2))
    send_queue.open(key("t"), "r", 2)
    send_queue.progress("r", [1], 1, None)
    segment = _next(send_queue, peer)
    send_queue.drop("r", "aborted")
    send_queue.finish({"r"})
    assert send_queue.collect() == set(), "the blocks are being read"
    send_queue.on_sent(peer, segment, True)
    assert send_queue.collect() == {"r"}
    assert _gone(send_queue, peer) == "aborted"


def test_unfetched_kv_expires() -> None:
    send_queue, peer, clock = _send_queue(hold=10)
    send_queue.open(key("t"), "r", 1)
    clock.now = 100
    send_queue.progress("r", [1], 1, None)
    send_queue.finish({"r"})
    clock.now = 110
    assert send_queue.collect() == set()
    clock.now = 110.1
    assert send_queue.collect() == {"r"}
    send_queue.on_want(peer, Want(key("t"), 0, 1))
    assert _gone(send_queue, peer) == "expired"


def test_a_prompt_that_is_not_computed_yet_does_not_expire() -> None:
    send_queue, peer, clock = _send_queue(hold=10)
    send_queue.open(key("t"), "r", 2)
    send_queue.progress("r", [1], 1, None)
    clock.now = 1000
    send_queue.collect()
    send_queue.progress("r", [1, 2], 2, None)
    send_queue.on_want(peer, Want(key("t"), 0, 2))
    assert _next(send_queue, peer).last


def test_the_proxy_releases_a_transfer_before_during_and_after() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.on_want(peer, Want(key("t", 1), 0, 1))
    send_queue.open(key("t", 2), "r2", 1)
    send_queue.on_release(None, Release("t"))
    assert _gone(send_queue, peer) == "released"
    send_queue.open(key("t", 3), "r3", 1)
    for prompt in (2, 3, 4):
        send_queue.on_want(peer, Want(key("t", prompt), 0, 1))
        assert _gone(send_queue, peer) == "released"
    send_queue.finish({"r2", "r3"})
    assert send_queue.collect() == {"r2", "r3"}


def test_decode_releases_what_it_does_not_need() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.open(key("t"), "r", 1)
    send_queue.progress("r", [1], 1, None)
    send_queue.on_release(peer, Release("t", key("t")))
    send_queue.finish({"r"})
    assert send_queue.collect() == {"r"}


def test_what_decode_has_released_before_is_not_held() -> None:
    """Decode often schedules a request before prefill does, and may find the prompt in its own prefix cache."""
    send_queue, peer, _ = _send_queue()
    send_queue.on_release(peer, Release("t", key("t")))
    send_queue.open(key("t"), "r", 1)
    send_queue.progress("r", [1], 1, None)
    send_queue.finish({"r"})
    assert send_queue.collect() == {"r"}


def test_a_lane_cannot_release_what_another_one_waits_for() -> None:
    send_queue, peer, _ = _send_queue()
    other = send_queue.attach(lambda: None)
    send_queue.on_want(peer, Want(key("t"), 0, 1))
    send_queue.open(key("t"), "r", 1)
    send_queue.on_release(other, Release("t", key("t")))
    send_queue.progress("r", [1], 1, None)
    assert _next(send_queue, peer).last


def test_a_dead_decodes_kv_is_freed() -> None:
    """What it waited for is computed by decode, or asked for under another transfer id."""
    send_queue, peer, _ = _send_queue()
    for name in ("begun", "later", "not wanted"):
        if name != "not wanted":
            send_queue.on_want(peer, Want(key(name), 0, 2))
        if name != "later":
            send_queue.open(key(name), name, 2)
            send_queue.progress(name, [1, 2], 1, None)
    send_queue.on_sent(peer, _next(send_queue, peer), False)
    send_queue.detach(peer)
    assert send_queue.next(peer, 0) is None
    send_queue.open(key("later"), "later", 2)
    for name in ("begun", "later", "not wanted"):
        send_queue.progress(name, [1, 2], 2, None)
    send_queue.finish({"begun", "later", "not wanted"})
    assert send_queue.collect() == {"begun", "later"}
    other = send_queue.attach(lambda: None)
    send_queue.on_want(other, Want(key("not wanted"), 0, 2))
    assert list(_next(send_queue, other).blocks) == [1, 2]


def test_a_second_want_is_refused() -> None:
    send_queue, peer, _ = _send_queue()
    other = send_queue.attach(lambda: None)
    send_queue.on_want(peer, Want(key("t"), 0, 1))
    send_queue.on_want(other, Want(key("t"), 0, 1))
    assert _gone(send_queue, other) == "wanted twice"


def test_blocks_that_are_not_those_of_the_prompt_are_refused() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.open(key("a"), "a", 2)
    send_queue.on_want(peer, Want(key("a"), 0, 3))
    assert "2 blocks, not 3" in _gone(send_queue, peer)
    send_queue.on_want(peer, Want(key("b"), 0, 3))
    send_queue.open(key("b"), "b", 2)
    assert "2 blocks, not 3" in _gone(send_queue, peer)
    _assert_freed(send_queue, "a", "b")


def test_another_adapter_under_the_same_name_is_refused() -> None:
    send_queue, peer, _ = _send_queue()
    send_queue.open(key("a"), "a", 2, "x")
    send_queue.on_want(peer, Want(key("a"), 0, 2, "y"))
    assert "adapter" in _gone(send_queue, peer)
    send_queue.on_want(peer, Want(key("b"), 0, 2))
    send_queue.open(key("b"), "b", 2, "x")
    assert "adapter" in _gone(send_queue, peer)
    _assert_freed(send_queue, "a", "b")


def _assert_freed(send_queue: SendQueue, *requests: str) -> None:
    """Nobody will ask for them again, so they are not held until they expire."""
    for request in requests:
        send_queue.progress(request, [1, 2], 2, None)
    send_queue.finish(requests)
    assert send_queue.collect() == set(requests)


def test_waiting_requests_are_bounded() -> None:
    send_queue, peer, _ = _send_queue(max_waiting=2)
    for name in "abc":
        send_queue.on_want(peer, Want(key(name), 0, 1))
    assert _gone(send_queue, peer) == "too many requests wait"
    assert send_queue.counts()["wants"] == 2
    send_queue.open(key("c"), "c", 1)
    send_queue.progress("c", [1], 1, None)
    send_queue.finish({"c"})
    assert send_queue.collect() == {"c"}, "nobody asks for it again"


def test_one_peer_does_not_take_the_share_of_others() -> None:
    send_queue, greedy, _ = _send_queue(max_waiting=4)
    for number in range(6):
        send_queue.on_want(greedy, Want(key(f"greedy{number}"), 0, 1))
    assert send_queue.counts()["wants"] == 4
    other = send_queue.attach(lambda: None)
    for number in range(3):
        send_queue.on_want(other, Want(key(f"other{number}"), 0, 1))
    assert len(greedy.wants) == 4 and len(other.wants) == 2
    assert _gone(send_queue, other) == "too many requests wait"


class Machine(RuleBasedStateMachine):
    """Any order of events: blocks are read only while they are held, and in the end nothing is left."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.send_queue = SendQueue(50, max_waiting=3, clock=self.clock)
        self.peers = [self.send_queue.attach(lambda: None) for _ in range(2)]
        self.opened = 0
        self.unfinished: dict[str, int] = {}
        self.freed: set[str] = set()
        self.finished: set[str] = set()
        self.reading: list[tuple[DecodePeer, Segment]] = []
        self.messages = 0

    @rule(name=st.integers(0, 3), total=st.integers(1, 3))
    def open(self, name: int, total: int) -> None:
        if any(segment.key == key(f"t{name}") for _, segment in self.reading):
            return
        request = f"r{self.opened}"
        self.opened += 1
        for other in [other for other, which in self.unfinished.items() if which == name]:
            self.send_queue.drop(other, "again")
            self.send_queue.finish({other})
            self.finished.add(other)
            del self.unfinished[other]
        self.send_queue.open(key(f"t{name}"), request, total)
        self.unfinished[request] = name

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data(), ready=st.integers(0, 3))
    def progress(self, data: Any, ready: int) -> None:
        self.send_queue.progress(data.draw(st.sampled_from(sorted(self.unfinished))), [4, 5, 6], ready, None)

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data(), abort=st.booleans())
    def finish(self, data: Any, abort: bool) -> None:
        request = data.draw(st.sampled_from(sorted(self.unfinished)))
        del self.unfinished[request]
        if abort:
            self.send_queue.drop(request, "aborted")
        self.send_queue.finish({request})
        self.finished.add(request)

    @rule(peer=st.integers(0, 1), name=st.integers(0, 3), first=st.integers(0, 2), count=st.integers(1, 3))
    def want(self, peer: int, name: int, first: int, count: int) -> None:
        self.send_queue.on_want(self.peers[peer], Want(key(f"t{name}"), first, count))

    @rule(peer=st.integers(0, 1), name=st.integers(0, 3))
    def release(self, peer: int, name: int) -> None:
        self.send_queue.on_release(self.peers[peer], Release(f"t{name}", key(f"t{name}")))

    @rule(peer=st.integers(0, 1))
    def next(self, peer: int) -> None:
        if any(busy is self.peers[peer] for busy, _ in self.reading):
            return
        item = self.send_queue.next(self.peers[peer], 0)
        if isinstance(item, Segment):
            assert item.job.request not in self.freed
            self.reading.append((self.peers[peer], item))

    @precondition(lambda self: self.reading)
    @rule(ok=st.booleans())
    def sent(self, ok: bool) -> None:
        peer, segment = self.reading.pop()
        self.send_queue.on_sent(peer, segment, ok)
        if not ok:
            self.detach(self.peers.index(peer))

    @rule(peer=st.integers(0, 1))
    def detach(self, peer: int) -> None:
        if not any(busy is self.peers[peer] for busy, _ in self.reading):
            self.send_queue.detach(self.peers[peer])
            self.peers[peer] = self.send_queue.attach(lambda: None)

    @rule(seconds=st.sampled_from([1, 60]))
    def collect(self, seconds: int) -> None:
        self.clock.now += seconds
        freed = self.send_queue.collect()
        assert freed <= self.finished and not freed & self.freed
        assert not freed & {segment.job.request for _, segment in self.reading}
        self.freed |= freed

    @invariant()
    def bounded(self) -> None:
        held = self.send_queue.counts()
        assert held["jobs"] <= 4
        assert held["wants"] <= 3 + held["jobs"]

    def teardown(self) -> None:
        while self.reading:
            self.sent(True)
        for request in list(self.unfinished):
            self.send_queue.drop(request, "end")
            self.send_queue.finish({request})
            self.finished.add(request)
        for peer in self.peers:
            self.send_queue.detach(peer)
        self.clock.now += 100
        self.freed |= self.send_queue.collect()
        assert self.freed == self.finished
        assert self.send_queue.counts() == {"jobs": 0, "requests": 0, "wants": 0, "peers": 0}


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
