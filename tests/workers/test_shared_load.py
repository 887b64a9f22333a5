"""The load table: claims never go over a limit, whatever the order, and nothing is left over."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from disagg_proxy.admission.queue import Limits
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.lease import EngineUse, KvClaim, Lease
from disagg_proxy.workers.shared_load import RowIndex, WorkerLoad
from disagg_proxy.workers.shared_table import LOADS, FlagColumn, SharedTable, SharedTableHeader, now
from tests.cluster.conftest import World

MOST, BUFFER = 2, 700


class Worker:
    """One worker's registry with a pair, joined to a table."""

    def __init__(self, table: SharedTable, number: int) -> None:
        self.world = World()
        self.pokes = 0
        self.ledger = WorkerLoad(table, number, self.world.registry, self._freed)
        self.prefill = self.world.ready(Role.PREFILL, 1)
        self.decode = self.world.ready(Role.DECODE, 2)
        for slot, instance in enumerate((self.prefill, self.decode)):
            self.ledger.place(instance, slot)
        self.limits = Limits(prefill=MOST, decode=MOST, kv_buffer=BUFFER)
        table.rows[number].head[SharedTableHeader.BEAT] = now()

    def _freed(self) -> None:
        self.pokes += 1

    def fits(self, size: int) -> bool:
        return all(self.limits.has_room(i, size) for i in (self.prefill, self.decode))

    def claim(self, size: int) -> bool:
        self.ledger.refresh()
        return self.fits(size) and self.claim_now(size)

    def claim_now(self, size: int) -> bool:
        """When there was room at the last look."""
        return self.ledger.claim([self.prefill, self.decode], size, lambda: self.fits(size))

    def legs(self, size: int) -> Legs:
        """What a claim turns into."""
        legs = Legs(self, size)
        self.ledger.settle()
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
        """Both have found room before either has claimed it."""
        one, other = self.workers[first], self.workers[second]
        one.ledger.refresh()
        other.ledger.refresh()
        if one is other or not (one.fits(size) and other.fits(size)):
            return multiple()
        got = []

        def meanwhile() -> bool:
            if other.claim_now(size):
                got.append((other, other.legs(size)))
            one.ledger.refresh()
            return one.fits(size)

        if one.ledger.claim([one.prefill, one.decode], size, meanwhile):
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
        self.table.bury(number)
        self.workers[number] = Worker(self.table, number)

    @invariant()
    def never_over(self) -> None:
        worker = self.workers[0]
        prefill, decode = total(self.table, worker.prefill), total(self.table, worker.decode)
        assert prefill[0] <= MOST and decode[0] <= MOST and decode[3] <= BUFFER

    @invariant()
    def everybody_sees_the_same(self) -> None:
        for worker in self.workers:
            worker.ledger.refresh()
            for instance in (worker.prefill, worker.decode):
                seen = [instance.in_flight, instance.visits, instance.kv_waiting, instance.kv_waiting_bytes]
                assert seen == total(self.table, instance) and min(seen) >= 0


Load.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_load = Load.TestCase


def test_of_two_that_claim_the_last_place_at_once_none_gets_too_much() -> None:
    table = new_table(2)
    first, second = Worker(table, 0), Worker(table, 1)
    for _ in range(MOST - 1):
        assert first.claim(1)
        first.legs(1)
    inner: list[bool] = []

    def between() -> bool:
        inner.append(second.claim_now(1))
        first.ledger.refresh()
        return first.fits(1)

    first.ledger.refresh()
    second.ledger.refresh()
    assert first.fits(1) and second.fits(1)
    outer = first.ledger.claim([first.prefill, first.decode], 1, between)
    assert (outer, inner) == (True, [False]), "the one that was first in sight of the other"
    assert second.pokes == 1, "what is taken back is told"
    assert first.ledger.pause != second.ledger.pause


def test_a_prompt_larger_than_the_buffer_gets_in_alone() -> None:
    table = new_table(2)
    first, second = Worker(table, 0), Worker(table, 1)
    assert first.claim(2 * BUFFER)
    legs = first.legs(2 * BUFFER)
    assert not second.claim(1)
    legs.end()
    assert second.claim(1)


def test_what_is_claimed_and_not_taken_is_given_back() -> None:
    table = new_table(2)
    worker, other = Worker(table, 0), Worker(table, 1)
    assert worker.claim(10)
    lease = Lease(worker.world.registry, worker.decode)
    worker.ledger.settle()
    assert total(table, worker.prefill) == [0, 0, 0, 0] and total(table, worker.decode) == [1, 0, 0, 0]
    assert worker.pokes == 1
    other.ledger.refresh()
    assert other.decode.in_flight == 1 and other.decode.elsewhere == (1, 0, 0, 0)
    lease.end()
    assert total(table, worker.decode) == [0, 0, 0, 0]


def test_a_visit_counts_elsewhere_and_makes_the_instance_busy() -> None:
    table = new_table(2)
    worker, other = Worker(table, 0), Worker(table, 1)
    with EngineUse(worker.world.registry, worker.prefill):
        other.ledger.refresh()
        assert not other.prefill.idle
    other.ledger.refresh()
    assert other.prefill.idle


def test_a_queue_is_seen_elsewhere_as_long_as_its_worker_goes_round() -> None:
    table = new_table(2)
    worker, other = Worker(table, 0), Worker(table, 1)
    worker.ledger.queue(3, 5.0)
    assert other.ledger.waiting() == 3 and worker.ledger.waiting() == 0
    assert other.ledger.waits_longer(6.0) and not other.ledger.waits_longer(4.0)
    table.rows[0].head[SharedTableHeader.BEAT] = 1
    assert other.ledger.waiting() == 0 and not other.ledger.waits_longer(6.0)


def test_another_process_at_the_same_endpoint_keeps_the_slot_and_the_old_legs_end_there() -> None:
    table = new_table(2)
    worker, other = Worker(table, 0), Worker(table, 1)
    lease = Lease(worker.world.registry, worker.decode)
    successor = Instance(Role.DECODE, worker.decode.http, worker.decode.kv, worker.decode.source, worker.decode.kind)
    worker.ledger.place(successor, worker.decode.slot)
    other.ledger.refresh()
    assert other.decode.in_flight == 1
    lease.end()
    other.ledger.refresh()
    assert other.decode.in_flight == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-(2**62), 2**62))))
def test_a_dead_workers_load_is_gone_and_its_findings_stay(said: list[tuple[int, int]]) -> None:
    table = new_table(2)
    row = table.rows[0]
    row.loads[5] = 7
    for slot, value in said:
        row.set_mark(slot, FlagColumn.FROZEN, abs(value))
        row.set_mark(slot, FlagColumn.MOVES, abs(value))
    newest = {slot: table.newest(slot, FlagColumn.FROZEN) for slot in range(6)}
    table.bury(0)
    assert {slot: table.newest(slot, FlagColumn.FROZEN) for slot in range(6)} == newest
    assert not any(row.loads) and not any(row.head) and not any(row.mark(s, FlagColumn.MOVES) for s in range(6))


def test_slots_are_given_again_only_when_nothing_is_on_them() -> None:
    table = new_table(2)
    slots = RowIndex(table)
    assert [slots.of("a"), slots.of("b"), slots.of("a")] == [0, 1, 0]
    table.rows[1].loads[2] = 1
    assert not slots.free("a")
    table.rows[1].loads[2] = 0
    table.rows[1].set_mark(0, FlagColumn.DRAINED, 5)
    assert not slots.free("a"), "an operator keeps it drained"
    table.rows[0].set_mark(0, FlagColumn.UNDRAINED, 6)
    assert slots.free("a") and not slots.free("a")
    assert [slots.of("c"), slots.of("d")] == [0, 2]
    for number in range(3, 1024):
        assert slots.of(str(number)) == number
    assert slots.of("one too many") is None


@pytest.mark.parametrize("workers", [1, 2, 64])
def test_rows_do_not_overlap(workers: int) -> None:
    table = new_table(workers)
    for number, row in enumerate(table.rows):
        row.head[15] = row.loads[-1] = number + 1
        row.set_mark(1023, FlagColumn.SEEN, number + 1)
    assert [(r.head[15], r.loads[-1], r.mark(1023, FlagColumn.SEEN)) for r in table.rows] == [
        (n + 1,) * 3 for n in range(workers + 1)
    ]
