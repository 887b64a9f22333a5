"""Decode's state machine: each load ends once, and never while a thread writes its blocks."""

from __future__ import annotations

import pytest

from disagg_kv.decode.inbox import Inbox, Load
from disagg_kv.protocol.frames import WireError
from disagg_kv.protocol.messages import Go
from tests.kv.memory import key


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _inbox(blocks: tuple[int, ...] = (5, 6, 7), first: int = 0) -> tuple[Inbox, Load, Clock]:
    clock = Clock()
    inbox = Inbox(clock)
    load = Load(key("t"), "r", blocks, first, deadline=30, peer="p")
    inbox.start(load)
    return inbox, load, clock


def test_filled_in_two_segments() -> None:
    inbox, load, _ = _inbox(first=2)
    assert inbox.go("p", Go(key("t"), 2, 1, False)) is load
    inbox.arrived(load, 1, True)
    assert not inbox.collect().requests
    assert inbox.go("p", Go(key("t"), 3, 2, True)) is load
    inbox.arrived(load, 2, True)
    news = inbox.collect()
    assert (news.requests, news.failed_blocks, news.unwanted) == ({"r"}, frozenset(), ())
    assert not inbox.collect().requests


@pytest.mark.parametrize("go", [Go(key("t"), 1, 2, True), Go(key("t"), 0, 4, True), Go(key("t"), 0, 3, False),
                                Go(key("t"), 0, 2, True)])  # fmt: skip
def test_blocks_that_were_not_asked_for_break_the_connection(go: Go) -> None:
    inbox, load, _ = _inbox()
    with pytest.raises(WireError, match="are wanted"):
        inbox.go("p", go)
    assert not load.writing


def test_another_peer_cannot_fill_or_end_a_load() -> None:
    inbox, _, _ = _inbox()
    assert inbox.go("q", Go(key("t"), 0, 3, True)) is None
    inbox.gone("q", key("t"), "x")
    inbox.lost("q", "x")
    assert inbox.waiting() == 1


@pytest.mark.parametrize("end", ["gone", "lost", "late", "broken"])
def test_a_load_that_fails_names_all_its_blocks(end: str) -> None:
    inbox, load, clock = _inbox()
    if end == "gone":
        inbox.gone("p", key("t"), "")
    elif end == "lost":
        inbox.lost("p", "connection refused")
    elif end == "late":
        clock.now = 30
    else:
        inbox.go("p", Go(key("t"), 0, 2, False))
        inbox.arrived(load, 2, False)
    news = inbox.collect()
    assert news.requests == {"r"}
    assert news.failed_blocks == {5, 6, 7}
    assert len(news.reasons) == 1
    if end != "late":
        news = inbox.collect()
    else:
        assert news.unwanted == (("p", key("t")),)
    assert inbox.waiting() == 0


def test_cancelled_while_it_waits() -> None:
    inbox, _, _ = _inbox()
    inbox.cancel("r")
    inbox.cancel("r")
    news = inbox.collect()
    assert news.requests == {"r"}
    assert news.unwanted == (("p", key("t")),)
    assert not news.reasons, "an aborted request is no failure"
    assert inbox.go("p", Go(key("t"), 0, 3, True)) is None, "what comes now is thrown away"


@pytest.mark.parametrize("end", ["cancel", "late", "gone"])
def test_not_over_while_its_blocks_are_written(end: str) -> None:
    inbox, load, clock = _inbox()
    inbox.go("p", Go(key("t"), 0, 3, True))
    if end == "cancel":
        inbox.cancel("r")
    else:
        clock.now = 31
    assert not inbox.collect().requests
    inbox.arrived(load, 3, True)
    news = inbox.collect()
    assert news.requests == {"r"}
    assert news.failed_blocks == {5, 6, 7}


def test_the_same_key_is_loaded_once_at_a_time() -> None:
    inbox, _, _ = _inbox()
    second = Load(key("t"), "r2", (9,), 0, deadline=30, peer="p")
    inbox.start(second)
    news = inbox.collect()
    assert news.requests == {"r2"}
    assert news.failed_blocks == {9}
    assert inbox.waiting() == 1


def test_the_proxy_releases_a_transfer_before_and_while_it_is_loaded() -> None:
    inbox, _, _ = _inbox()
    inbox.release("t")
    news = inbox.collect()
    assert (news.requests, news.failed_blocks, news.unwanted) == ({"r"}, {5, 6, 7}, (("p", key("t")),))
    inbox.start(Load(key("t", 1), "r2", (9,), 0, deadline=30, peer="p"))
    assert inbox.collect().requests == {"r2"}
    assert inbox.waiting() == 0
