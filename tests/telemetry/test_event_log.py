"""Sequence numbers, merged events, and waiting for entries."""

from __future__ import annotations

import asyncio

from disagg_proxy.telemetry.event_log import EVENTS, RECORDS, EventLog
from tests.conftest import soon


def test_sequence_numbers_grow_and_are_unique_over_workers(desk) -> None:
    time = 1.0
    logs = [EventLog(worker, lambda: time) for worker in range(5)]
    for _ in range(3):
        for event_log in logs:
            event_log.add_event("admitted", "a", "x")
    seqs = [event.seq for event_log in logs for event in event_log.events]
    assert len(set(seqs)) == 15 and all([e.seq for e in j.events] == sorted(e.seq for e in j.events) for j in logs)
    time = 2.0
    logs[0].add_event("lost", "a", "x")
    assert logs[0].last > max(seqs)


def test_the_newest_are_kept(desk) -> None:
    for number in range(EVENTS + 5):
        desk.event_log.add_event("lost", "a", str(number))
    assert len(desk.event_log.events) == EVENTS and desk.event_log.events[0].text == "5"
    for _ in range(RECORDS + 5):
        desk.admitted().end()
    assert len(desk.event_log.records) == RECORDS


def test_repeated_events_are_merged(desk) -> None:
    event_log = desk.event_log

    def released(instance: str) -> None:
        event_log.add_repeated("kv_drained", instance, "one", "{} of them")

    released("a")
    released("b")
    first = event_log.last
    desk.after(5)
    released("a")
    released("a")
    assert [(e.instance, e.text, e.count) for e in event_log.events] == [("b", "one", 1), ("a", "3 of them", 3)]
    assert event_log.last > first
    desk.after(60)
    released("a")
    assert event_log.events[-1].count == 1, "long ago"


async def test_subscribers_and_waiters_get_records_and_events(desk) -> None:
    event_log = desk.event_log
    notified: list[int] = []
    leave = event_log.subscribe(lambda: notified.append(event_log.last))
    waiting = asyncio.ensure_future(event_log.wait_for_entry(event_log.last))
    await asyncio.sleep(0)
    desk.admitted().end()
    await soon(waiting)
    event_log.add_event("lost", "a", "x")
    await soon(event_log.wait_for_entry(0)), "there is an entry already"
    leave()
    event_log.add_event("lost", "a", "x")
    assert len(notified) == 2 and not event_log._subscribers
