"""The newest finished requests and the newest events of one process, kept in memory.

Every entry has a sequence number that grows with time, also over restarts of a worker, and that no other worker
assigns: microseconds of Unix time, rounded down to a multiple of 64, plus the number of the worker.
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
_SEQ_STEP = 64
_MERGE_WITHIN = 10.0
"""Seconds within which repeated events of one kind and instance are merged into one with a count."""


@dataclass(slots=True)
class Event:
    """A change of an instance, or of the proxy.

    Attributes:
        seq: sequence number among records and events.
        time: Unix time in seconds.
        kind: one of the kinds in docs/observe.md.
        instance: key of the instance, None for the proxy.
        text: a sentence for operators.
        count: occurrences merged into this event.
        packed: msgpack of :meth:`row`, cached by page_state.py.
    """

    seq: int
    time: float
    kind: str
    instance: str | None
    text: str
    count: int = 1
    packed: bytes | None = None

    def row(self) -> list[Any]:
        """The values to be packed, in the order of the constructor."""
        return [self.seq, self.time, self.kind, self.instance, self.text, self.count]


Subscriber = Callable[[], None]
"""Called after each new entry; must not block or raise."""


class EventLog:
    """Records and events of one process. Not thread-safe: for the event loop's thread only.

    Args:
        worker: the number of this worker, 0 for a single process.
        wall: Unix time in seconds.
    """

    def __init__(self, worker: int = 0, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._worker = worker % _SEQ_STEP
        self._subscribers: list[Subscriber] = []
        self.last = 0
        """The newest sequence number."""
        self.records: deque[RequestRecord] = deque(maxlen=RECORDS)
        self.events: deque[Event] = deque(maxlen=EVENTS)
        self.inherited: list[tuple[int, bytes]] = []
        """Sequence numbers and packed records of the worker that this one has replaced."""

    def _next_seq(self, now: float) -> int:
        seq = int(now * 1e6) // _SEQ_STEP * _SEQ_STEP + self._worker
        self.last = seq if seq > self.last else self.last + _SEQ_STEP
        return self.last

    # -- adding entries

    def add(self, record: RequestRecord) -> None:
        """Add a request that has ended."""
        now = self._wall()
        record.seq = self._next_seq(now)
        record.unix = now - record.total
        self.records.append(record)
        if self._subscribers:
            self._notify()

    def add_event(self, kind: str, instance: str | None, text: str) -> None:
        """Add an event; ``instance`` is a key, None for the proxy."""
        now = self._wall()
        self.events.append(Event(self._next_seq(now), now, kind, instance, text))
        self._notify()

    def add_repeated(self, kind: str, instance: str | None, one: str, many: str) -> None:
        """Add an event, merged with one of the same kind and instance that is at most ten seconds old.

        Args:
            one: the text of a single occurrence.
            many: the text of several, with ``{}`` for their number.
        """
        now = self._wall()
        before = next((e for e in reversed(self.events) if e.kind == kind and e.instance == instance), None)
        if before is None or now - before.time > _MERGE_WITHIN:
            self.add_event(kind, instance, one)
            return
        self.events.remove(before)
        count = before.count + 1
        self.events.append(Event(self._next_seq(now), now, kind, instance, many.format(count), count))
        self._notify()

    # -- waiting for entries

    def _notify(self) -> None:
        for subscriber in self._subscribers:
            subscriber()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call ``subscriber`` after every entry. Returns the function that ends the subscription."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    async def wait_for_entry(self, after: int) -> None:
        """Return once there is an entry with a sequence number above ``after``."""
        if self.last > after:
            return
        added = asyncio.Event()
        unsubscribe = self.subscribe(added.set)
        try:
            await added.wait()
        finally:
            unsubscribe()
