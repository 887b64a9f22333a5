"""One worker reads the load of the engines for all, whichever of them needs it."""

from __future__ import annotations

from disagg_proxy.cluster.engine_load import EngineLoad
from disagg_proxy.cluster.instance import Role
from disagg_proxy.workers.shared_engine_loads import SharedEngineLoads
from disagg_proxy.workers.shared_table import LIVE_FOR, RowHeader, SharedTable, now
from tests.cluster.conftest import World


def table(workers: int) -> SharedTable:
    shared = SharedTable(memoryview(bytearray(SharedTable.size(workers))), workers)
    for row in shared.workers:
        row.head[RowHeader.HEARTBEAT] = now() + 600 * LIVE_FOR
    return shared


def test_the_first_responsive_worker_reads_when_any_needs_it() -> None:
    shared = table(3)
    parts = [SharedEngineLoads(shared, number, World().registry, lambda message: None) for number in range(3)]

    def readers(*needed: bool) -> list[int]:
        for part, need in zip(parts, needed, strict=True):
            part.reads_loads(need)
        return [number for number, part in enumerate(parts) if part.reads_loads(needed[number])]

    assert readers(False, False, False) == []
    assert readers(False, False, True) == [0]
    assert readers(True, True, True) == [0]
    shared.rows[0].head[RowHeader.HEARTBEAT] = now() - LIVE_FOR
    assert [part.reads_loads(True) for part in parts[1:]] == [True, False]
    shared.retire(2)
    shared.rows[2].head[RowHeader.HEARTBEAT] = 0
    assert parts[1].reads_loads(False) is False, "a worker that has ended needs nothing"


def test_a_reading_reaches_the_other_workers() -> None:
    here, there = World(), World()
    sent: list = []
    sender = SharedEngineLoads(table(2), 0, here.registry, sent.append)
    receiver = SharedEngineLoads(table(2), 1, there.registry, sent.append)
    instance, same = here.ready(Role.DECODE, 1), there.ready(Role.DECODE, 1)
    sender.share_load(instance)
    assert sent == []
    instance.engine_load = EngineLoad(7.5, 3, 0, 0.5, 4096, None)
    sender.share_load(instance)
    receiver.on_message(sent[0])
    assert same.engine_load == instance.engine_load
    receiver.on_message(["load", "elsewhere:1", 1.0, 1, 1, 0.1, 1, 1])
