"""The load table: claims never exceed a limit in any order, and nothing is left over."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from disagg_proxy.admission.queue import Limits
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.lease import EngineUse, KvClaim, Lease
from disagg_proxy.workers.shared_load import RowIndex, WorkerLoad
from disagg_proxy.workers.shared_table import LOADS, FlagColumn, RowHeader, SharedTable, now
from tests.cluster.conftest import World

MOST, BUFFER = 2, 700


class Worker:
    """One worker's registry with a pair, joined to a table."""

    def __init__(self, table: SharedTable, number: int) -> None:
        self.world = World()
        self.wakeups = 0
        self.load = WorkerLoad(table, number, self.world.registry, self._freed)
        self.prefill = self.world.ready(Role.PREFILL, 1)
        self.decode = self.world.ready(Role.DECODE, 2)
        for slot, instance in enumerate((self.prefill, self.decode)):
            self.load.assign_slot(instance, slot)
        self.limits = Limits(prefill=MOST, decode=MOST, kv_tokens=BUFFER)
        table.rows[number].head[RowHeader.HEARTBEAT] = now()

    def _freed(self) -> None:
        self.wakeups += 1

    def fits(self, size: int) -> bool:
        return all(self.limits.has_capacity(i, size) for i in (self.prefill, self.decode))

    def claim(self, size: int) -> bool:
        self.load.refresh()
        return self.fits(size) and self.claim_now(size)

    def claim_now(self, size: int) -> bool:
        """Claim without checking for capacity first."""
        return self.load.claim([self.prefill, self.decode], size, lambda: self.fits(size))

    def legs(self, size: int) -> Legs:
        """Turn a claim into legs."""
        legs = Legs(self, size)
        self.load.settle()
        return legs


class Legs:
    def __init__(self, worker: Worker, size: int) -> None:
        registry = worker.world.registry
        self.leases = [Lease(registry, worker.prefill), Lease(registry, worker.decode)]
        self.kv = KvClaim(registry, worker.prefill, worker.decode, size)

    def end(self) -> None:
        for lease in self.leases:
            lease.end()
        self.kv.release()


def new_table(workers: int = 3) -> SharedTable:
    return SharedTable(memoryview(bytearray(SharedTable.size(workers))), workers)


def total(table: SharedTable, instance: Instance) -> list[int]:
    at = instance.slot * LOADS
    return [sum(row.loads[at + count] for row in table.rows) for count in range(LOADS)]


class Load(RuleBasedStateMachine):
    """Three workers that claim, begin, end and die in any order, also in the middle of each other's claims."""

    legs = Bundle("legs")

    def __init__(self) -> None:
        super().__init__()
        self.table = new_table()
        self.workers = [Worker(self.table, number) for number in range(3)]

    @rule(target=legs, number=st.integers(0, 2), size=st.integers(1, 600))
    def begin(self, number: int, size: int):
        worker = self.workers[number]
        return multiple((worker, worker.legs(size))) if worker.claim(size) else multiple()

    @rule(target=legs, first=st.integers(0, 2), second=st.integers(0, 2), size=st.integers(1, 600))
    def begin_both_at_once(self, first: int, second: int, size: int):
        """Both have found capacity before either has claimed it."""
        one, other = self.workers[first], self.workers[second]
        one.load.refresh()
        other.load.refresh()
        if one is other or not (one.fits(size) and other.fits(size)):
            return multiple()
        got = []

        def meanwhile() -> bool:
            if other.claim_now(size):
                got.append((other, other.legs(size)))
            one.load.refresh()
            return one.fits(size)

        if one.load.claim([one.prefill, one.decode], size, meanwhile):
            got.append((one, one.legs(size)))
        return multiple(*got)

    @rule(one=consumes(legs))
    def end(self, one) -> None:
        worker, legs = one
        if worker in self.workers:
            legs.end()

    @rule(one=legs, part=st.floats(0, 1))
    def is_prefilled(self, one, part: float) -> None:
        """Its KV turns out to be smaller than was estimated."""
        worker, legs = one
        if worker in self.workers:
            legs.kv.resize(int(legs.kv._size * part))

    @rule(number=st.integers(0, 2))
    def die(self, number: int) -> None:
        self.table.retire(number)
        self.workers[number] = Worker(self.table, number)

    @invariant()
    def never_over(self) -> None:
        worker = self.workers[0]
        prefill, decode = total(self.table, worker.prefill), total(self.table, worker.decode)
        assert prefill[0] <= MOST and decode[0] <= MOST and decode[3] <= BUFFER

    @invariant()
    def everybody_sees_the_same(self) -> None:
        for worker in self.workers:
            worker.load.refresh()
            for instance in (worker.prefill, worker.decode):
                seen = [
                    instance.in_flight, instance.direct_requests, instance.kv_waiting, instance.kv_waiting_tokens,
                    instance.answering, instance.kv_committed,
                ]  # fmt: skip
                assert seen == total(self.table, instance) and min(seen) >= 0


Load.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_load = Load.TestCase


def test_two_simultaneous_claims_of_the_last_capacity_never_both_succeed() -> None:
    table = new_table(2)
    first, second = Worker(table, 0), Worker(table, 1)
    for _ in range(MOST - 1):
        assert first.claim(1)
        first.legs(1)
    inner: list[bool] = []

    def between() -> bool:
        inner.append(second.claim_now(1))
        first.load.refresh()
        return first.fits(1)

    first.load.refresh()
    second.load.refresh()
    assert first.fits(1) and second.fits(1)
    outer = first.load.claim([first.prefill, first.decode], 1, between)
    assert (outer, inner) == (True, [False]), "the one that was first in sight of the other"
    assert second.wakeups == 1, "other queues are notified of a withdrawn claim"
    assert first.load.pause != second.load.pause


def test_a_prompt_larger_than_the_buffer_gets_in_alone() -> None:
    table = new_table(2)
    first, second = Worker(table, 0), Worker(table, 1)
    assert first.claim(2 * BUFFER)
    legs = first.legs(2 * BUFFER)
    assert not second.claim(1)
    legs.end()
    assert second.claim(1)


def test_an_unused_claim_is_released() -> None:
    table = new_table(2)
    worker, other = Worker(table, 0), Worker(table, 1)
    assert worker.claim(10)
    lease = Lease(worker.world.registry, worker.decode)
    worker.load.settle()
    assert total(table, worker.prefill) == [0] * LOADS and total(table, worker.decode) == [1, *[0] * (LOADS - 1)]
    assert worker.wakeups == 1
    other.load.refresh()
    assert other.decode.in_flight == 1 and other.decode.peer_counts == (1, 0, 0, 0, 0, 0)
    lease.end()
    assert total(table, worker.decode) == [0] * LOADS


def test_a_visit_counts_in_other_workers_and_makes_the_instance_busy() -> None:
    table = new_table(2)
    worker, other = Worker(table, 0), Worker(table, 1)
    with EngineUse(worker.world.registry, worker.prefill):
        other.load.refresh()
        assert not other.prefill.idle
    other.load.refresh()
    assert other.prefill.idle


def test_a_queue_is_seen_by_other_workers_while_its_worker_is_responsive() -> None:
    table = new_table(2)
    worker, other = Worker(table, 0), Worker(table, 1)
    worker.load.queue(3, 5.0)
    assert other.load.waiting() == 3 and worker.load.waiting() == 0
    assert other.load.has_older_waiter(6.0) and not other.load.has_older_waiter(4.0)
    table.rows[0].head[RowHeader.HEARTBEAT] = 1
    assert other.load.waiting() == 0 and not other.load.has_older_waiter(6.0)


def test_another_process_at_the_same_endpoint_keeps_the_slot_and_the_old_legs_end_there() -> None:
    table = new_table(2)
    worker, other = Worker(table, 0), Worker(table, 1)
    lease = Lease(worker.world.registry, worker.decode)
    successor = Instance(Role.DECODE, worker.decode.http, worker.decode.kv, worker.decode.source, worker.decode.kind)
    worker.load.assign_slot(successor, worker.decode.slot)
    other.load.refresh()
    assert other.decode.in_flight == 1
    lease.end()
    other.load.refresh()
    assert other.decode.in_flight == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-(2**62), 2**62))))
def test_a_dead_workers_load_is_released_and_its_flags_are_kept(flags: list[tuple[int, int]]) -> None:
    table = new_table(2)
    row = table.rows[0]
    row.loads[5] = 7
    for slot, value in flags:
        row.set_flag(slot, FlagColumn.FROZEN, abs(value))
        row.set_flag(slot, FlagColumn.PROGRESS, abs(value))
    newest = {slot: table.newest(slot, FlagColumn.FROZEN) for slot in range(6)}
    table.retire(0)
    assert {slot: table.newest(slot, FlagColumn.FROZEN) for slot in range(6)} == newest
    assert not any(row.loads) and not any(row.head) and not any(row.flag(s, FlagColumn.PROGRESS) for s in range(6))


def test_slots_are_reassigned_only_when_unused() -> None:
    table = new_table(2)
    slots = RowIndex(table)
    assert [slots.slot_of("a"), slots.slot_of("b"), slots.slot_of("a")] == [0, 1, 0]
    table.rows[1].loads[2] = 1
    assert not slots.free("a")
    table.rows[1].loads[2] = 0
    table.rows[1].set_flag(0, FlagColumn.DRAINED, 5)
    assert not slots.free("a"), "an operator keeps it drained"
    table.rows[0].set_flag(0, FlagColumn.UNDRAINED, 6)
    assert slots.free("a") and not slots.free("a")
    assert [slots.slot_of("c"), slots.slot_of("d")] == [0, 2]
    for number in range(3, 1024):
        assert slots.slot_of(str(number)) == number
    assert slots.slot_of("one too many") is None


@pytest.mark.parametrize("workers", [1, 2, 64])
def test_rows_do_not_overlap(workers: int) -> None:
    table = new_table(workers)
    for number, row in enumerate(table.rows):
        row.head[15] = row.loads[-1] = number + 1
        row.set_flag(1023, FlagColumn.DRAIN_APPLIED, number + 1)
    assert [(r.head[15], r.loads[-1], r.flag(1023, FlagColumn.DRAIN_APPLIED)) for r in table.rows] == [
        (n + 1,) * 3 for n in range(workers + 1)
    ]
