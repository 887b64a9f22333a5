"""Decode's state machine: each load ends once, and never while a thread writes its blocks."""

from __future__ import annotations

import pytest

from disagg_kv.decode.pending_loads import Load, PendingLoads
from disagg_kv.protocol.frames import WireError
from disagg_kv.protocol.messages import Go, Want
from tests.kv.memory import key


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _pending(blocks: tuple[int, ...] = (5, 6, 7), first: int = 0) -> tuple[PendingLoads, Load, Clock]:
    clock = Clock()
    pending = PendingLoads(clock)
    load = Load(key("t"), "r", blocks, first, deadline=30, peer="p")
    pending.start(load)
    return pending, load, clock


def test_filled_in_two_segments() -> None:
    pending, load, _ = _pending(first=2)
    assert pending.on_go("p", Go(key("t"), 2, 1, False)) is load
    pending.on_received(load, 1, True)
    assert not pending.collect().requests
    assert pending.on_go("p", Go(key("t"), 3, 2, True)) is load
    pending.on_received(load, 2, True)
    news = pending.collect()
    assert (news.requests, news.failed_blocks, news.unwanted) == ({"r"}, frozenset(), ())
    assert not pending.collect().requests


@pytest.mark.parametrize("go", [Go(key("t"), 1, 2, True), Go(key("t"), 0, 4, True), Go(key("t"), 0, 3, False),
                                Go(key("t"), 0, 2, True)])  # fmt: skip
def test_unrequested_blocks_break_the_connection(go: Go) -> None:
    pending, load, _ = _pending()
    with pytest.raises(WireError, match="expected 0"):
        pending.on_go("p", go)
    assert not load.writing


def test_another_peer_cannot_fill_or_end_a_load() -> None:
    pending, _, _ = _pending()
    assert pending.on_go("q", Go(key("t"), 0, 3, True)) is None
    pending.on_gone("q", key("t"), "x")
    pending.on_connection_lost("q", "x")
    assert pending.waiting() == 1


@pytest.mark.parametrize("end", ["gone", "lost", "late", "broken"])
def test_a_load_that_fails_names_all_its_blocks(end: str) -> None:
    pending, load, clock = _pending()
    if end == "gone":
        pending.on_gone("p", key("t"), "")
    elif end == "lost":
        pending.on_connection_lost("p", "connection refused")
    elif end == "late":
        clock.now = 30
    else:
        pending.on_go("p", Go(key("t"), 0, 2, False))
        pending.on_received(load, 2, False)
    news = pending.collect()
    assert news.requests == {"r"}
    assert news.failed_blocks == {5, 6, 7}
    assert len(news.reasons) == 1
    if end != "late":
        news = pending.collect()
    else:
        assert news.unwanted == (("p", key("t")),)
    assert pending.waiting() == 0


def test_cancelled_while_it_waits() -> None:
    pending, _, _ = _pending()
    pending.cancel("r")
    pending.cancel("r")
    news = pending.collect()
    assert news.requests == {"r"}
    assert news.unwanted == (("p", key("t")),)
    assert not news.reasons, "an aborted request is no failure"
    assert pending.on_go("p", Go(key("t"), 0, 3, True)) is None, "what comes now is thrown away"


@pytest.mark.parametrize("end", ["cancel", "late", "gone"])
def test_not_over_while_its_blocks_are_written(end: str) -> None:
    pending, load, clock = _pending()
    pending.on_go("p", Go(key("t"), 0, 3, True))
    if end == "cancel":
        pending.cancel("r")
    else:
        clock.now = 31
    assert not pending.collect().requests
    pending.on_received(load, 3, True)
    news = pending.collect()
    assert news.requests == {"r"}
    assert news.failed_blocks == {5, 6, 7}


def test_the_same_key_is_loaded_once_at_a_time() -> None:
    pending, _, _ = _pending()
    second = Load(key("t"), "r2", (9,), 0, deadline=30, peer="p")
    pending.start(second)
    news = pending.collect()
    assert news.requests == {"r2"}
    assert news.failed_blocks == {9}
    assert pending.waiting() == 1


def test_the_proxy_releases_a_transfer_before_and_while_it_is_loaded() -> None:
    pending, _, _ = _pending()
    pending.release("t")
    news = pending.collect()
    assert (news.requests, news.failed_blocks, news.unwanted) == ({"r"}, {5, 6, 7}, (("p", key("t")),))
    pending.start(Load(key("t", 1), "r2", (9,), 0, deadline=30, peer="p"))
    assert pending.collect().requests == {"r2"}
    assert pending.waiting() == 0


def test_tails_are_requested_and_received_like_other_blocks() -> None:
    pending = PendingLoads(Clock())
    load = Load(key("t"), "r", (5, 6, 7, 8), 2, deadline=30, peer="p", tails=(1, 2))
    assert load.want() == Want(key("t"), 2, 4, "", (1, 2))
    pending.start(load)
    assert pending.on_go("p", Go(key("t"), 2, 4, True)) is load
    pending.on_received(load, 4, False)
    news = pending.collect()
    assert news.requests == {"r"} and not news.loaded, "a request that failed, for vLLM with several cache groups"
