"""The newest finished requests and the newest events of one process, in memory, and a way to wait for more.

Every entry has a sequence number that grows with time, also across restarts of a worker, and that no other worker
gives: microseconds of Unix time, in steps of 64, plus the worker's number.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from disagg_proxy.telemetry.request_record import RequestRecord

log = logging.getLogger(__name__)

RECORDS, EVENTS = 256, 512
_SPACE = 64
_SAME_WITHIN = 10.0
"""Seconds within which events that come in numbers are counted as one."""


@dataclass(slots=True)
class Event:
    """Something that happened to an instance, or to the proxy itself.

    Attributes:
        seq: its place among records and events. time: Unix.
        kind: a word of docs/observe.md.
        instance: its key, None for the proxy itself.
        text: a sentence for people.
        count: how often it happened since its first time, for those that come in numbers.
        packed: what the page is told of it (news.py), once somebody has asked.
    """

    seq: int
    time: float
    kind: str
    instance: str | None
    text: str
    count: int = 1
    packed: bytes | None = None

    def row(self) -> list[Any]:
        """As plain values."""
        return [self.seq, self.time, self.kind, self.instance, self.text, self.count]


Subscriber = Callable[[], None]
"""Told that there is something new; must not block or raise."""


class EventLog:
    """Told from the event loop's thread only.

    Args:
        worker: number of this process.
    """

    def __init__(self, worker: int = 0, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._worker = worker % _SPACE
        self._subscribers: list[Subscriber] = []
        self.last = 0
        """The newest sequence number."""
        self.records: deque[RequestRecord] = deque(maxlen=RECORDS)
        self.events: deque[Event] = deque(maxlen=EVENTS)
        self.inherited: list[tuple[int, bytes]] = []
        """Packed records that a process has left whose place this one has taken."""

    def _next(self, now: float) -> int:
        seq = int(now * 1e6) // _SPACE * _SPACE + self._worker
        self.last = seq if seq > self.last else self.last + _SPACE
        return self.last

    # -- what comes in

    def add(self, record: RequestRecord) -> None:
        """A request has ended."""
        now = self._wall()
        record.seq = self._next(now)
        record.unix = now - record.total
        self.records.append(record)
        if self._subscribers:
            self._news()

    def tell(self, kind: str, instance: str | None, text: str) -> None:
        """Something has happened."""
        now = self._wall()
        self.events.append(Event(self._next(now), now, kind, instance, text))
        self._news()

    def count(self, kind: str, instance: str | None, one: str, many: str) -> None:
        """The same for what comes in numbers; ``many`` has a place for the count. The newest one takes the count over
        from one of the last seconds."""
        now = self._wall()
        before = next((e for e in reversed(self.events) if e.kind == kind and e.instance == instance), None)
        if before is None or now - before.time > _SAME_WITHIN:
            self.tell(kind, instance, one)
            return
        self.events.remove(before)
        count = before.count + 1
        self.events.append(Event(self._next(now), now, kind, instance, many.format(count), count))
        self._news()

    # -- who waits for it

    def _news(self) -> None:
        for subscriber in self._subscribers:
            subscriber()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call ``subscriber`` after every entry, until the returned function is called."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    async def news(self, after: int) -> None:
        """Return when there is an entry after the one with this number."""
        if self.last > after:
            return
        came = asyncio.Event()
        leave = self.subscribe(came.set)
        try:
            await came.wait()
        finally:
            leave()
