"""Several workers keep one limit of a client key."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg_proxy.config import Config
from disagg_proxy.config.keys_file import digest
from disagg_proxy.keys.key_table import KeyTable
from disagg_proxy.telemetry.stats import Stats
from disagg_proxy.workers.shared_usage import ROW_BYTES, WorkerUsage


class Workers:
    """The key tables of some workers over one file, with one clock."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        self.file = folder / "keys.toml"
        self.write("alice", "bob")
        self.now = 0.0
        self.rows = [memoryview(bytearray(ROW_BYTES)) for _ in range(count)]
        self.tables = [self.start(worker) for worker in range(count)]

    def write(self, *names: str) -> None:
        tables = [
            f'[[keys]]\nname = "{name}"\nhash = "sha256:{digest(name.encode()).hex()}"\n'
            "requests_per_minute = 60\ntokens_per_minute = 600\n"
            for name in names
        ]
        self.file.write_text("".join(tables))

    def start(self, worker: int) -> KeyTable:
        stats = Stats(lambda: self.now)
        return KeyTable(Config(api_keys_file=str(self.file)), stats, WorkerUsage(self.rows, worker))

    def admitted(self, worker: int, name: str = "alice", tokens: int = 0) -> bool:
        table = self.tables[worker]
        return table.find(name.encode()).admit(tokens, table._stats, False) is None


@pytest.fixture
def workers(tmp_path: Path) -> Workers:
    return Workers(tmp_path)


def test_all_workers_together_keep_the_limit(workers: Workers) -> None:
    assert sum(workers.admitted(n % 3) for n in range(300)) == 60
    assert workers.admitted(1, "bob"), "another key has its own"
    workers.now += 10
    assert sum(workers.admitted(n % 3) for n in range(300)) == 10
    workers.now += 600
    assert sum(workers.admitted(n % 3) for n in range(300)) == 60


def test_a_correction_counts_in_all_workers(workers: Workers) -> None:
    assert workers.admitted(0, tokens=500)
    assert not workers.admitted(1, tokens=200)
    workers.tables[0].find(b"alice").settle(-400, workers.now)
    assert workers.admitted(1, tokens=200)
    workers.tables[1].find(b"alice").settle(1000, workers.now)
    assert not workers.admitted(2, tokens=1)


def test_a_worker_that_is_replaced_counts_on_and_does_not_count_the_past(workers: Workers) -> None:
    assert sum(workers.admitted(0) for _ in range(20)) == 20
    workers.tables[0] = workers.start(0)
    assert sum(workers.admitted(0) for _ in range(5)) == 5
    assert sum(workers.admitted(1) for _ in range(100)) == 35, "what the former one used still counts here"
    assert sum(workers.admitted(0) for _ in range(100)) == 20, "the new one began with a full limit"


def test_during_a_reload_counters_of_another_list_are_left_out(workers: Workers) -> None:
    assert sum(workers.admitted(0) for _ in range(20)) == 20
    workers.write("bob", "alice")
    workers.tables[1].reload()
    assert sum(workers.admitted(1) for _ in range(10)) == 10, "worker 0 still has the former order"
    assert workers.admitted(1, "bob")
    for worker in (0, 2):
        workers.tables[worker].reload()
    assert sum(workers.admitted(1) for _ in range(100)) == 60 - 20 - 10
    assert not workers.admitted(1) and workers.admitted(1, "bob")
    workers.now += 60
    assert sum(workers.admitted(n % 3) for n in range(300)) == 60, "one list again"


def test_a_list_that_comes_back_begins_at_zero(workers: Workers) -> None:
    for names in (("bob", "alice"), ("alice", "bob")):
        workers.write(*names)
        workers.tables[0].reload()
    assert workers.admitted(0)
    assert workers.tables[1].find(b"alice").requests.used(0.0) == 1


def test_a_removed_key_charges_no_other_ones_limit(workers: Workers) -> None:
    """A request whose head was read before the reload is admitted after it."""
    alice = workers.tables[0].find(b"alice")
    workers.write("bob")
    for table in workers.tables:
        table.reload()
    assert alice.admit(0, workers.tables[0]._stats, False) is None
    assert workers.tables[1].find(b"bob").requests.used(workers.now) == 0
