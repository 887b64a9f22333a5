"""What processes publish for the page, and the merge of it."""

from __future__ import annotations

from disagg_proxy.cluster.instance import Role
from disagg_proxy.telemetry.event_log import EventLog
from disagg_proxy.telemetry.page_state import PageState, inherit, merge_states, merge_step, page_state_of, unpack_record
from disagg_proxy.telemetry.request_recorder import RequestRecorder
from disagg_proxy.telemetry.stats import Stats
from disagg_proxy.telemetry.timeseries import SECONDS, STEPS, TimeSeries
from disagg_proxy.workers.shared_memory import MAX_SNAPSHOT
from tests.telemetry.conftest import Desk


class Worker(Desk):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.recorder = RequestRecorder(
            Stats(lambda: self.time), EventLog(number, lambda: self.wall), TimeSeries(lambda: self.wall)
        )  # fmt: skip

    def published(self) -> PageState:
        return PageState.unpack(page_state_of(self.recorder).pack(MAX_SNAPSHOT))


def test_records_of_all_workers_are_ordered_by_their_end() -> None:
    one, other = Worker(0), Worker(1)
    for worker in (one, other, one, other):
        for each in (one, other):
            each.after(1)
        worker.admitted().end()
    merged = merge_states([one.published(), other.published()], one.wall)
    ends = [unpack_record(packed)["seq"] for packed in merged.records]
    assert len(ends) == 4 and ends == sorted(ends) and [seq % 64 for seq in ends] == [0, 1, 0, 1]


def test_events_that_every_worker_detects_are_shown_once() -> None:
    one, other = Worker(0), Worker(1)
    for worker in (one, other):
        worker.event_log.add_event("frozen", "d", "x")
        worker.event_log.add_event("breaker_opened", "d", "x")
        worker.after(5)
        worker.event_log.add_event("freed", "d", "x")
        worker.after(1)
        worker.event_log.add_event("frozen", "d", "again")
    merged = merge_states([one.published(), other.published()], one.wall)
    assert [e.kind for e in merged.events] == ["frozen", "breaker_opened", "breaker_opened", "freed", "frozen"]


def test_flows_are_added(world) -> None:
    prefill, decode = world.ready(Role.PREFILL, 1), world.ready(Role.DECODE, 2)
    one, other = Worker(0), Worker(1)
    for worker in (one, other):
        worker.admitted().on_attempt(prefill, decode, "x")
    one.admitted().on_attempt(None, decode, "x")
    merged = merge_states([one.published(), other.published()], one.wall)
    assert {(f.prefill, f.in_flight, f.total) for f in merged.flows} == {(prefill.key, 2, 2), (None, 1, 1)}


def test_a_replacement_continues_from_its_predecessors_state(world) -> None:
    dead, heir = Worker(2), Worker(2)
    record = dead.admitted()
    record.on_attempt(None, world.ready(Role.DECODE, 2), "x")
    record.complete()
    record.end()
    dead.event_log.add_event("lost", "a", "x")
    dead.admitted().on_attempt(None, world.instance(2), "y")
    inherit(heir.recorder, dead.published())
    assert heir.event_log.last == dead.event_log.last
    heir.admitted().end()
    heir.after(5)
    merged = merge_states([heir.published()], heir.wall)
    assert [unpack_record(packed)["outcome"] for packed in merged.records] == ["ok", "client_left"]
    assert [e.kind for e in merged.events] == ["lost"]
    assert [(f.in_flight, f.total) for f in merged.flows] == [(0, 2)], "requests in flight ended with the worker"


def test_the_oldest_entries_are_omitted_at_the_size_limit() -> None:
    worker = Worker(0)
    for number in range(300):
        worker.event_log.add_event("lost", "a", str(number) * 100)
        worker.admitted().end()
    text = page_state_of(worker.recorder).pack(20_000)
    assert 0 < len(text) <= 20_000
    kept = PageState.unpack(text)
    assert (
        kept.records[-1][0] == worker.event_log.records[-1].seq
        and kept.events[-1][0] == worker.event_log.events[-1].seq
    )
    assert page_state_of(worker.recorder).pack(10) == b"" and PageState.unpack(b"") == PageState()


def test_steps_of_all_workers_are_merged() -> None:
    one, other = Worker(0), Worker(1)
    for worker, pieces in ((one, 3), (other, 4)):
        timeseries = worker.recorder.timeseries
        timeseries.now.pieces = pieces
        timeseries.now.ttft.add(0.1)
        timeseries.now.outcomes["ok"] += 1
        timeseries.sample(2, 1, 500)
    begun = one.recorder.timeseries.now.start
    one.after(3 * SECONDS)
    one.recorder.timeseries.sample(0, 0, 0)
    merged = merge_states([one.published(), other.published()], one.wall)
    steps = [merge_step(start, parts) for start, parts in merged.steps]
    assert [s.start for s in steps] == [begun + (n - STEPS + 4) * SECONDS for n in range(STEPS)]
    then = steps[-4]
    assert (then.start, then.pieces, then.in_flight, then.queued, then.kv_waiting_bytes) == (begun, 7, 4, 2, 500)
    assert sum(then.ttft.counts.values()) == then.outcomes["ok"] == 2
    assert not any(step.pieces for step in steps if step is not then)


def test_finished_entries_are_packed_once() -> None:
    worker = Worker(0)
    worker.admitted().end()
    worker.event_log.add_repeated("kv_drained", "a", "one", "{} of them")
    first = page_state_of(worker.recorder)
    worker.recorder.timeseries.now.pieces += 1
    worker.event_log.add_repeated("kv_drained", "a", "one", "{} of them")
    second = page_state_of(worker.recorder)
    assert first.records[0][1] is second.records[0][1]
    assert first.events != second.events and first.steps != second.steps
