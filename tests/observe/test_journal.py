"""Numbers of entries, events that come in numbers, and waiting for more."""

from __future__ import annotations

import asyncio

from disagg_proxy.observe.journal import EVENTS, RECORDS, Journal
from tests.conftest import soon


def test_numbers_grow_and_no_two_workers_give_the_same(desk) -> None:
    time = 1.0
    journals = [Journal(worker, lambda: time) for worker in range(5)]
    for _ in range(3):
        for journal in journals:
            journal.tell("admitted", "a", "x")
    seqs = [event.seq for journal in journals for event in journal.events]
    assert len(set(seqs)) == 15 and all([e.seq for e in j.events] == sorted(e.seq for e in j.events) for j in journals)
    time = 2.0
    journals[0].tell("lost", "a", "x")
    assert journals[0].last > max(seqs)


def test_the_newest_are_kept(desk) -> None:
    for number in range(EVENTS + 5):
        desk.journal.tell("lost", "a", str(number))
    assert len(desk.journal.events) == EVENTS and desk.journal.events[0].text == "5"
    for _ in range(RECORDS + 5):
        desk.admitted().end()
    assert len(desk.journal.records) == RECORDS


def test_what_comes_in_numbers_is_counted(desk) -> None:
    journal = desk.journal

    def drained(instance: str) -> None:
        journal.count("kv_drained", instance, "one", "{} of them")

    drained("a")
    drained("b")
    first = journal.last
    desk.after(5)
    drained("a")
    drained("a")
    assert [(e.instance, e.text, e.count) for e in journal.events] == [("b", "one", 1), ("a", "3 of them", 3)]
    assert journal.last > first
    desk.after(60)
    drained("a")
    assert journal.events[-1].count == 1, "long ago"


async def test_who_waits_is_told_of_records_and_events(desk) -> None:
    journal = desk.journal
    heard: list[int] = []
    leave = journal.subscribe(lambda: heard.append(journal.last))
    waiting = asyncio.ensure_future(journal.news(journal.last))
    await asyncio.sleep(0)
    desk.admitted().end()
    await soon(waiting)
    journal.tell("lost", "a", "x")
    await soon(journal.news(0)), "there is something already"
    leave()
    journal.tell("lost", "a", "x")
    assert len(heard) == 2 and not journal._subscribers
