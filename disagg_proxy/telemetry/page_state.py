"""What a process publishes for the page: its newest records and events, its steps, its flows. And all of them as one.

What has ended does not change any more, so that it is packed once and decoded once, however often it is looked at.

Where there are several workers each sees the same instances by itself, so that of the events that all of them find out
(happenings.py) only the first is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import msgpack

from disagg_proxy.telemetry.event_log import EVENTS, RECORDS, Event
from disagg_proxy.telemetry.instance_events import SEEN_BY_ALL
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.telemetry.request_recorder import Flow, RequestRecorder
from disagg_proxy.telemetry.timeseries import SECONDS, STEPS, Step

_ALIKE = 15.0
"""Seconds within which several workers find out the same: three probe intervals at their default."""

_MOST_ID = 64

Entry = tuple[int, bytes]
"""The number by which it is ordered, and the packed rest."""


@dataclass(slots=True)
class PageState:
    """One process's, each oldest first.

    Attributes:
        records, events: by their sequence numbers. steps: by the beginning of each.
        flows: prefill, decode, in flight, total.
    """

    records: list[Entry] = field(default_factory=list)
    events: list[Entry] = field(default_factory=list)
    steps: list[Entry] = field(default_factory=list)
    flows: list[list[Any]] = field(default_factory=list)

    def pack(self, most: int) -> bytes:
        """As at most so many bytes: the oldest records and events are left out where they do not fit."""
        records, events = self.records, self.events
        while True:
            text = _pack([records, events, self.steps, self.flows])
            if len(text) <= most:
                return text
            if not records and not events:
                return b""
            records, events = records[len(records) // 2 + 1 :], events[len(events) // 2 + 1 :]

    @classmethod
    def unpack(cls, text: bytes) -> PageState:
        """From :meth:`pack`; empty from nothing."""
        return cls(*msgpack.unpackb(text, use_list=False)) if text else cls()


def news_of(recorder: RequestRecorder) -> PageState:
    """This process's."""
    event_log, timeseries = recorder.event_log, recorder.timeseries
    records = [*event_log.inherited, *map(_record_entry, event_log.records)][-RECORDS:]
    steps = [*map(_step_entry, timeseries.before), (timeseries.now.start, _pack(timeseries.now.row()))]
    flows = [[f.prefill, f.decode, f.in_flight, f.total] for f in recorder.flows.values()]
    return PageState(records, [*map(_event_entry, event_log.events)], steps, flows)


def _pack(value: Any) -> bytes:
    return bytes(msgpack.packb(value))


def _record_entry(record: RequestRecord) -> Entry:
    if record.packed is None:
        record.packed = _pack(_row(record))
    return record.seq, record.packed


def _event_entry(event: Event) -> Entry:
    if event.packed is None:
        event.packed = _pack(event.row())
    return event.seq, event.packed


def _step_entry(step: Step) -> Entry:
    """Of one that is over."""
    if step.packed is None:
        step.packed = _pack(step.row())
    return step.start, step.packed


def inherit(recorder: RequestRecorder, left: PageState) -> None:
    """Go on from what a process has left whose place this one has taken."""
    event_log = recorder.event_log
    event_log.inherited = list(left.records)
    event_log.events.extend(_event(packed) for _, packed in left.events)
    event_log.last = max([0, *(seq for seq, _ in (*left.records, *left.events))])
    recorder.timeseries.inherit(_step(packed) for _, packed in left.steps)
    for prefill, decode, _, total in left.flows:
        recorder.flows[prefill, decode] = Flow(prefill, decode, 0, total)


# -- all processes


@dataclass(slots=True)
class MergedPageState:
    """The news of all processes, each oldest first.

    Attributes:
        records: to be read with :func:`fields_of`.
        steps: the last ten minutes, each step once, with what the processes have packed of it: see :func:`step_of`.
    """

    records: list[bytes]
    events: list[Event]
    steps: list[tuple[int, tuple[bytes, ...]]]
    flows: list[Flow]


def together(parts: Sequence[PageState], now: float) -> MergedPageState:
    """All processes as one.

    Args:
        now: Unix time.
    """
    records = [packed for _, packed in sorted(entry for part in parts for entry in part.records)[-RECORDS:]]
    flows: dict[tuple[str | None, str], Flow] = {}
    for part in parts:
        for prefill, decode, in_flight, total in part.flows:
            flow = flows.setdefault((prefill, decode), Flow(prefill, decode))
            flow.in_flight += in_flight
            flow.total += total
    newest = int(now // SECONDS) * SECONDS
    steps: dict[int, tuple[bytes, ...]] = dict.fromkeys(range(newest - (STEPS - 1) * SECONDS, newest + 1, SECONDS), ())
    for part in parts:
        for start, packed in part.steps:
            if start in steps:
                steps[start] = (*steps[start], packed)
    return MergedPageState(records, _events(parts), list(steps.items()), list(flows.values()))


def _events(parts: Sequence[PageState]) -> list[Event]:
    whole: list[Event] = []
    seen: dict[tuple[str, str | None], tuple[int, float]] = {}
    told = sorted((seq, number, packed) for number, part in enumerate(parts) for seq, packed in part.events)
    for _, worker, packed in told:
        event = _event(packed)
        if event.kind in SEEN_BY_ALL:
            first = seen.get((event.kind, event.instance))
            if first is not None and first[0] != worker and event.time - first[1] < _ALIKE:
                continue
            seen[event.kind, event.instance] = (worker, event.time)
        whole.append(event)
    return whole[-EVENTS:]


@lru_cache(maxsize=4096)
def _event(packed: bytes) -> Event:
    return Event(*msgpack.unpackb(packed))


def _step(packed: bytes) -> Step:
    return Step.of(msgpack.unpackb(packed, strict_map_key=False))


def step_of(start: int, parts: Sequence[bytes]) -> Step:
    """One step of all processes."""
    whole = Step(start)
    for packed in parts:
        whole.take(_step(packed))
    return whole


def fields_of(packed: bytes) -> dict[str, Any]:
    """The fields of a record by their names."""
    return dict(zip(FIELDS, cast(list[Any], msgpack.unpackb(packed)), strict=True))


# -- records as plain values


def _offset(moment: Callable[[RequestRecord], float | None]) -> Callable[[RequestRecord], float | None]:
    def since_arrival(record: RequestRecord) -> float | None:
        return _ms(None if (at := moment(record)) is None else at - record.arrived)

    return since_arrival


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


_READ: dict[str, Callable[[RequestRecord], Any]] = {
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


def _row(record: RequestRecord) -> list[Any]:
    return [read(record) for read in _READ.values()]
