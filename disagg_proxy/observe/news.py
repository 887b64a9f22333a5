"""What a process publishes for the page: its newest records and events, its steps, its flows. And all of them as one.

Where there are several workers each sees the same instances by itself, so that of the events that all of them find out
(happenings.py) only the first is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from disagg_proxy.observe.happenings import SEEN_BY_ALL
from disagg_proxy.observe.journal import EVENTS, RECORDS, Event, Journal
from disagg_proxy.observe.meter import Step, merged
from disagg_proxy.observe.record import Record
from disagg_proxy.observe.recorder import Flow, Recorder

_ALIKE = 15.0
"""Seconds within which several workers find out the same: three probe intervals at their default."""

_MOST_ID = 64


@dataclass(slots=True)
class News:
    """One process's, or all together, each oldest first.

    Attributes:
        records: rows of :data:`FIELDS`. events, steps, flows: rows.
    """

    records: list[list[Any]] = field(default_factory=list)
    events: list[list[Any]] = field(default_factory=list)
    steps: list[list[Any]] = field(default_factory=list)
    flows: list[list[Any]] = field(default_factory=list)

    def pack(self, most: int) -> bytes:
        """As at most so many bytes: the oldest records and events are left out where they do not fit."""
        records, events = self.records, self.events
        while True:
            text = bytes(msgpack.packb([records, events, self.steps, self.flows]))
            if len(text) <= most:
                return text
            if not records and not events:
                return b""
            records, events = records[len(records) // 2 + 1 :], events[len(events) // 2 + 1 :]

    @classmethod
    def unpack(cls, text: bytes) -> News:
        """From :meth:`pack`; empty from nothing."""
        return cls(*msgpack.unpackb(text, strict_map_key=False)) if text else cls()


def news_of(recorder: Recorder) -> News:
    """This process's."""
    journal = recorder.journal
    rows = [*journal.inherited, *map(_row, journal.records)][-RECORDS:]
    flows = [[f.prefill, f.decode, f.in_flight, f.total] for f in recorder.flows.values()]
    return News(rows, [event.row() for event in journal.events], recorder.meter.rows(), flows)


def inherit(recorder: Recorder, journal: Journal, left: News) -> None:
    """Go on from what a process has left whose place this one has taken."""
    journal.inherited = left.records
    journal.events.extend(Event(*row) for row in left.events)
    journal.last = max([0, *(row[0] for row in (*left.records, *left.events))])
    recorder.meter.inherit(left.steps)
    for prefill, decode, _, total in left.flows:
        recorder.flows[prefill, decode] = Flow(prefill, decode, 0, total)


def together(parts: Sequence[News], now: float) -> tuple[list[list[Any]], list[Event], list[Step], list[Flow]]:
    """Records (rows of :data:`FIELDS`), events, steps and flows of all processes, oldest first."""
    records = sorted((row for part in parts for row in part.records), key=lambda row: row[0])[-RECORDS:]
    flows: dict[tuple[str | None, str], Flow] = {}
    for part in parts:
        for prefill, decode, in_flight, total in part.flows:
            flow = flows.setdefault((prefill, decode), Flow(prefill, decode))
            flow.in_flight += in_flight
            flow.total += total
    return records, _events(parts), merged([part.steps for part in parts], now), list(flows.values())


def _events(parts: Sequence[News]) -> list[Event]:
    whole: list[Event] = []
    seen: dict[tuple[str, str | None], tuple[int, float]] = {}
    told = sorted(((Event(*row), number) for number, part in enumerate(parts) for row in part.events), key=_when)
    for event, worker in told:
        if event.kind in SEEN_BY_ALL:
            first = seen.get((event.kind, event.instance))
            if first is not None and first[0] != worker and event.time - first[1] < _ALIKE:
                continue
            seen[event.kind, event.instance] = (worker, event.time)
        whole.append(event)
    return whole[-EVENTS:]


def _when(told: tuple[Event, int]) -> int:
    return told[0].seq


# -- records as plain values


def _offset(moment: Callable[[Record], float | None]) -> Callable[[Record], float | None]:
    def since_arrival(record: Record) -> float | None:
        return _ms(None if (at := moment(record)) is None else at - record.arrived)

    return since_arrival


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


_READ: dict[str, Callable[[Record], Any]] = {
    "seq": lambda r: r.seq,
    "time": lambda r: round(r.unix, 3),
    "id": lambda r: r.public_id,
    "client_id": lambda r: r.client_id and r.client_id[:_MOST_ID],
    "route": lambda r: r.route,
    "model": lambda r: r.model and r.model[:_MOST_ID],
    "prefill": lambda r: r.prefill,
    "decode": lambda r: r.decode,
    "tries": lambda r: r.tries,
    "status": lambda r: r.status,
    "outcome": lambda r: r.outcome,
    "cause": lambda r: r.cause,
    "streamed": lambda r: r.streamed,
    "prompt_tokens": lambda r: r.prompt_tokens,
    "cached_tokens": lambda r: r.cached_tokens,
    "output_tokens": lambda r: r.output_tokens,
    "pieces": lambda r: r.pieces,
    "queue_ms": lambda r: _ms(r.queue_time),
    "prefill_ms": lambda r: _ms(r.prefill_time),
    "ttft_ms": lambda r: _ms(r.ttft),
    "total_ms": lambda r: _ms(r.total),
    "gap_ms": lambda r: _ms(r.mean_gap),
    "gap_max_ms": lambda r: _ms(r.gap_max) if r.gaps else None,
    "ready_at": _offset(lambda r: r.ready),
    "admitted_at": _offset(lambda r: r.admitted),
    "prefill_asked_at": _offset(lambda r: r.prefill_asked),
    "prefill_answered_at": _offset(lambda r: r.prefill_answered),
    "decode_asked_at": _offset(lambda r: r.decode_asked),
    "first_byte_at": _offset(lambda r: r.first_byte),
}
FIELDS = tuple(_READ)
"""Names of a record's row."""


def _row(record: Record) -> list[Any]:
    return [read(record) for read in _READ.values()]
