"""Numbers of entries, events that come in numbers, and waiting for more."""

from __future__ import annotations

import asyncio

from disagg_proxy.telemetry.event_log import EVENTS, RECORDS, EventLog
from tests.conftest import soon


def test_numbers_grow_and_no_two_workers_give_the_same(desk) -> None:
    time = 1.0
    journals = [EventLog(worker, lambda: time) for worker in range(5)]
    for _ in range(3):
        for event_log in journals:
            event_log.tell("admitted", "a", "x")
    seqs = [event.seq for event_log in journals for event in event_log.events]
    assert len(set(seqs)) == 15 and all([e.seq for e in j.events] == sorted(e.seq for e in j.events) for j in journals)
    time = 2.0
    journals[0].tell("lost", "a", "x")
    assert journals[0].last > max(seqs)


def test_the_newest_are_kept(desk) -> None:
    for number in range(EVENTS + 5):
        desk.event_log.tell("lost", "a", str(number))
    assert len(desk.event_log.events) == EVENTS and desk.event_log.events[0].text == "5"
    for _ in range(RECORDS + 5):
        desk.admitted().end()
    assert len(desk.event_log.records) == RECORDS


def test_what_comes_in_numbers_is_counted(desk) -> None:
    event_log = desk.event_log

    def drained(instance: str) -> None:
        event_log.count("kv_drained", instance, "one", "{} of them")

    drained("a")
    drained("b")
    first = event_log.last
    desk.after(5)
    drained("a")
    drained("a")
    assert [(e.instance, e.text, e.count) for e in event_log.events] == [("b", "one", 1), ("a", "3 of them", 3)]
    assert event_log.last > first
    desk.after(60)
    drained("a")
    assert event_log.events[-1].count == 1, "long ago"


async def test_who_waits_is_told_of_records_and_events(desk) -> None:
    event_log = desk.event_log
    heard: list[int] = []
    leave = event_log.subscribe(lambda: heard.append(event_log.last))
    waiting = asyncio.ensure_future(event_log.news(event_log.last))
    await asyncio.sleep(0)
    desk.admitted().end()
    await soon(waiting)
    event_log.tell("lost", "a", "x")
    await soon(event_log.news(0)), "there is something already"
    leave()
    event_log.tell("lost", "a", "x")
    assert len(heard) == 2 and not event_log._subscribers
