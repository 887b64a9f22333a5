"""What each process publishes for the page (records, events, time steps, flows), and the merge over all processes.

Finished entries are immutable, so each is packed once and unpacked once, however often the page reads it.

With several workers each one monitors the same instances. Of events that every worker detects (instance_events.py) only
the first is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import msgpack

from disagg_proxy.telemetry.event_log import EVENTS, RECORDS, Event
from disagg_proxy.telemetry.instance_events import SEEN_BY_EVERY_WORKER
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.telemetry.request_recorder import Flow, RequestRecorder
from disagg_proxy.telemetry.timeseries import SECONDS, STEPS, Step

_SAME_EVENT_WITHIN = 15.0
"""Seconds within which several workers detect the same change: three probe intervals at their default."""

_MAX_ID = 64

Entry = tuple[int, bytes]
"""The number that entries are sorted by, and the packed entry."""


@dataclass(slots=True)
class PageState:
    """The state of one process, each list oldest first.

    Attributes:
        records, events: entries by sequence number.
        steps: entries by the Unix time of their start.
        flows: rows of prefill key, decode key, in flight, total.
    """

    records: list[Entry] = field(default_factory=list)
    events: list[Entry] = field(default_factory=list)
    steps: list[Entry] = field(default_factory=list)
    flows: list[list[Any]] = field(default_factory=list)

    def pack(self, max_bytes: int) -> bytes:
        """As msgpack, at most ``max_bytes``: the oldest records and events are omitted where they do not fit."""
        records, events = self.records, self.events
        while True:
            text = _pack([records, events, self.steps, self.flows])
            if len(text) <= max_bytes:
                return text
            if not records and not events:
                return b""
            records, events = records[len(records) // 2 + 1 :], events[len(events) // 2 + 1 :]

    @classmethod
    def unpack(cls, text: bytes) -> PageState:
        """Reverse :meth:`pack`; an empty text gives an empty state."""
        return cls(*msgpack.unpackb(text, use_list=False)) if text else cls()


def page_state_of(recorder: RequestRecorder) -> PageState:
    """The current state of this process."""
    event_log, timeseries = recorder.event_log, recorder.timeseries
    records = [*event_log.inherited, *map(_record_entry, event_log.records)][-RECORDS:]
    steps = [*map(_step_entry, timeseries.past), (timeseries.now.start, _pack(timeseries.now.row()))]
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
    # Only for steps that have ended: the packed form is cached.
    if step.packed is None:
        step.packed = _pack(step.row())
    return step.start, step.packed


def inherit(recorder: RequestRecorder, left: PageState) -> None:
    """Continue from ``left``, the last published state of the worker that this one replaces."""
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
    """The state of all processes, each list oldest first.

    Attributes:
        records: packed, for :func:`unpack_record`.
        events: without those that several workers have detected alike.
        steps: the last ten minutes: start of each step and its packed parts, for :func:`merge_step`.
        flows: summed over all processes.
    """

    records: list[bytes]
    events: list[Event]
    steps: list[tuple[int, tuple[bytes, ...]]]
    flows: list[Flow]


def merge_states(parts: Sequence[PageState], now: float) -> MergedPageState:
    """Merge the states of all processes.

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
    merged: list[Event] = []
    seen: dict[tuple[str, str | None], tuple[int, float]] = {}
    entries = sorted((seq, number, packed) for number, part in enumerate(parts) for seq, packed in part.events)
    for _, worker, packed in entries:
        event = _event(packed)
        if event.kind in SEEN_BY_EVERY_WORKER:
            first = seen.get((event.kind, event.instance))
            if first is not None and first[0] != worker and event.time - first[1] < _SAME_EVENT_WITHIN:
                continue
            seen[event.kind, event.instance] = (worker, event.time)
        merged.append(event)
    return merged[-EVENTS:]


@lru_cache(maxsize=4096)
def _event(packed: bytes) -> Event:
    return Event(*msgpack.unpackb(packed))


def _step(packed: bytes) -> Step:
    return Step.from_row(msgpack.unpackb(packed, strict_map_key=False))


def merge_step(start: int, parts: Sequence[bytes]) -> Step:
    """The step that starts at ``start``, merged over all processes."""
    merged = Step(start)
    for packed in parts:
        merged.merge(_step(packed))
    return merged


def unpack_record(packed: bytes) -> dict[str, Any]:
    """The fields of a record by name."""
    return dict(zip(FIELDS, cast(list[Any], msgpack.unpackb(packed)), strict=True))


# -- records as rows of plain values


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
    "client_id": lambda r: r.client_id and r.client_id[:_MAX_ID],
    "route": lambda r: r.route,
    "model": lambda r: r.model and r.model[:_MAX_ID],
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
    "prefill_sent_at": _offset(lambda r: r.prefill_sent),
    "prefill_done_at": _offset(lambda r: r.prefill_done),
    "decode_sent_at": _offset(lambda r: r.decode_sent),
    "first_byte_at": _offset(lambda r: r.first_byte),
}
FIELDS = tuple(_READ)
"""Names of the values in the row of a record."""


def _row(record: RequestRecord) -> list[Any]:
    return [read(record) for read in _READ.values()]
