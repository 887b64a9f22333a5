"""IPC with ``process_vm_readv`` in place of the copy on a GPU: reads, fences, fallbacks, and processes that die."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from disagg_kv.protocol.frames import Kind, WireError, encode
from disagg_kv.transport import process_memory
from disagg_kv.transport.ipc import decode_ids, encode_ids, read_nonce, read_num_blocks, read_planes
from disagg_kv.transport.place import Place
from disagg_kv.transport.process_memory import ExportedProcessMemory, ProcessMemoryReader
from tests.kv.addresses import AddressCache, ipc_decode, ipc_prefill
from tests.kv.memory import Decode, Prefill, key, until

pytestmark = pytest.mark.skipif(bool(process_memory.why_unavailable()), reason=process_memory.why_unavailable())
Make = Callable[..., Any]


def _wait(condition: Callable[[], bool]) -> None:
    until(condition, lambda: threading.Event().wait(0.01) and None)


class HeldReads:
    """Reads that wait in the middle until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on, self.over = threading.Event(), threading.Event(), threading.Event()
        read = ProcessMemoryReader.read

        def held(reader: ProcessMemoryReader, source: Any, target: Any, fence: Any, seconds: float) -> None:
            self.begun.set()
            assert self.go_on.wait(20)
            try:
                read(reader, source, target, fence, seconds)
            finally:
                self.over.set()

        monkeypatch.setattr(ProcessMemoryReader, "read", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldReads]:
    reads = HeldReads(monkeypatch)
    yield reads
    reads.go_on.set()


@pytest.fixture
def pair(prefill: Make, decode: Make) -> tuple[Prefill, Decode]:
    return ipc_prefill(prefill), ipc_decode(decode)


def test_blocks_are_read(pair: tuple[Prefill, Decode]) -> None:
    p, d = pair
    p.compute(key("t"), [3, 1, 4, 5, 6], seed=7)
    d.load(key("t"), p.address, [10, 11, 12, 13, 40])
    assert not d.result().failed_blocks
    assert d.cache.content([10, 11, 12, 13, 40]) == p.cache.content([3, 1, 4, 5, 6])
    assert d.connections.transports.running() == {p.address: "ipc"}


def test_every_choice_of_blocks_arrives(pair: tuple[Prefill, Decode]) -> None:
    p, d = pair
    rnd = random.Random(3)
    for number in range(60):
        count = rnd.randint(1, 60)
        source, target = rnd.sample(range(64), count), rnd.sample(range(64), count)
        p.compute(key(f"t{number}"), source, seed=number)
        d.load(key(f"t{number}"), p.address, target)
        assert not d.result().failed_blocks
        assert d.cache.content(target) == p.cache.content(source)
    assert p.server.connections() == 1


def test_more_rows_than_one_call_takes(prefill: Make, decode: Make) -> None:
    p, d = ipc_prefill(prefill, 5000), ipc_decode(decode, 5000)
    source, target = list(range(0, 4000)), list(range(4999, 999, -1))
    p.compute(key("t"), source, seed=9)
    d.load(key("t"), p.address, target)
    assert not d.result().failed_blocks
    assert d.cache.content(target) == p.cache.content(source)


def test_wanted_before_computed_and_sent_in_parts(pair: tuple[Prefill, Decode]) -> None:
    p, d = pair
    blocks = list(range(40))
    d.load(key("t"), p.address, blocks)
    p.cache.fill(blocks, 3)
    p.send_queue.open(key("t"), "r", 40)
    p.send_queue.progress("r", blocks, 15, None)
    p.send_queue.progress("r", blocks, 40, None)
    assert not d.result().failed_blocks
    assert d.cache.content(blocks) == p.cache.content(blocks)


def test_blocks_are_read_behind_their_fence(pair: tuple[Prefill, Decode]) -> None:
    p, d = pair
    passed = threading.Event()
    p.send_queue.open(key("t"), "r", 1)
    p.send_queue.progress("r", [2], 1, lambda: passed.wait(20))
    d.load(key("t"), p.address, [9])
    d.pending.wait(0.05)
    assert d.pending.waiting() == 1
    p.cache.fill([2], 5)
    passed.set()
    assert not d.result().failed_blocks
    assert d.cache.content([9]) == p.cache.content([2])


def test_prefill_keeps_blocks_while_they_are_read(pair: tuple[Prefill, Decode], held: HeldReads) -> None:
    p, d = pair
    p.compute(key("t"), [3, 1])
    p.send_queue.finish(["t"])
    d.load(key("t"), p.address, [10, 11])
    assert held.begun.wait(20)
    assert p.send_queue.collect() == set()
    held.go_on.set()
    assert not d.result().failed_blocks
    freed: set[str] = set()
    _wait(lambda: bool(freed.update(p.send_queue.collect()) or freed))
    assert freed == {"t"}


def test_a_reader_that_is_gone_holds_no_blocks_and_gives_its_own_back_after_the_copy(
    pair: tuple[Prefill, Decode], held: HeldReads
) -> None:
    p, d = pair
    p.compute(key("t"), [3, 1])
    p.send_queue.finish(["t"])
    d.load(key("t"), p.address, [10, 11])
    assert held.begun.wait(20)
    d.connections.close()
    freed: set[str] = set()
    _wait(lambda: bool(freed.update(p.send_queue.collect()) or freed))
    assert d.pending.collect().requests == frozenset(), "the copy still writes"
    held.go_on.set()
    assert d.result().failed_blocks == {10, 11}
    assert held.over.is_set()


def test_blocks_of_a_prefill_that_is_gone_are_not_used(pair: tuple[Prefill, Decode], held: HeldReads) -> None:
    """The copy itself succeeds: the memory is still there."""
    p, d = pair
    p.compute(key("t"), [3, 1])
    d.load(key("t"), p.address, [10, 11])
    assert held.begun.wait(20)
    p.server.close()
    held.go_on.set()
    result = d.result()
    assert held.over.is_set() and result.failed_blocks == {10, 11}


def test_a_preempted_request_ends_a_read_that_takes_long(pair: tuple[Prefill, Decode], held: HeldReads) -> None:
    p, d = pair
    p.compute(key("t"), [3, 1])
    d.load(key("t"), p.address, [10, 11])
    assert held.begun.wait(20)
    assert not p.send_queue.suspend("t", 0.05)
    held.go_on.set()
    assert d.result().failed_blocks == {10, 11}


def test_an_aborted_load_discards_and_the_connection_goes_on(pair: tuple[Prefill, Decode], held: HeldReads) -> None:
    p, d = pair
    p.compute(key("t"), [3, 1])
    d.load(key("t"), p.address, [10, 11])
    assert held.begun.wait(20)
    d.pending.cancel("d-t")
    assert d.pending.collect().requests == frozenset()
    held.go_on.set()
    assert d.result().requests == {"d-t"}
    p.compute(key("u"), [5])
    d.load(key("u"), p.address, [6])
    assert not d.result().failed_blocks
    assert p.server.connections() == 1


def test_prefill_gives_up_a_reader_that_does_not_acknowledge(prefill: Make, decode: Make, held: HeldReads) -> None:
    p, d = ipc_prefill(prefill, stall_timeout_s=0.2), ipc_decode(decode)
    p.compute(key("t"), [3])
    p.send_queue.finish(["t"])
    d.load(key("t"), p.address, [10])
    assert held.begun.wait(20)
    freed: set[str] = set()
    _wait(lambda: bool(freed.update(p.send_queue.collect()) or freed))
    held.go_on.set()
    assert d.result().failed_blocks == {10}


_CHILD = """
import sys
from tests.kv.addresses import AddressCache, ipc_prefill
from tests.kv.memory import Prefill, key
p = ipc_prefill(Prefill)
p.compute(key("t"), [3, 1, 4], seed=7)
print(p.address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """A prefill engine in a process of its own; the first line that it prints is its address."""
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        yield child
        child.kill()


def test_another_process_is_read(process: subprocess.Popen[str], decode: Make) -> None:
    assert process.stdout is not None
    address, d = process.stdout.readline().strip(), ipc_decode(decode)
    d.load(key("t"), address, [10, 11, 12])
    assert not d.result().failed_blocks
    expected = AddressCache()
    expected.fill([3, 1, 4], 7)
    assert d.cache.content([10, 11, 12]) == expected.content([3, 1, 4])
    assert d.connections.transports.running() == {address: "ipc"}


def test_prefill_is_killed_while_it_is_read(process: subprocess.Popen[str], decode: Make, held: HeldReads) -> None:
    assert process.stdout is not None
    address, d = process.stdout.readline().strip(), ipc_decode(decode)
    d.load(key("t"), address, [10, 11, 12])
    assert held.begun.wait(20)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    held.go_on.set()
    assert d.result().failed_blocks == {10, 11, 12}


@pytest.mark.parametrize(
    ("number", "words"), [(1, "another user, or kernel.yama.ptrace_scope"), (3, "No such process")]
)
def test_what_cannot_be_read_is_sent_over_tcp(
    pair: tuple[Prefill, Decode], monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    class Denied:
        def process_vm_readv(self, *arguments: Any) -> int:
            ctypes.set_errno(number)
            return -1

    p, d = pair
    monkeypatch.setattr(process_memory, "_library", Denied)
    p.compute(key("t"), [3])
    d.load(key("t"), p.address, [10])
    assert not d.result().failed_blocks
    assert d.cache.content([10]) == p.cache.content([3])
    link = d.connections.transports.running()[p.address]
    assert link.startswith("tcp; ipc failed: ") and words in link


def test_the_memory_of_another_process_is_recognised(
    pair: tuple[Prefill, Decode], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a process id of another namespace that exists here too."""
    p, d = pair
    describe = ExportedProcessMemory.describe
    monkeypatch.setattr(ExportedProcessMemory, "describe", lambda self: {**describe(self), "nonce": "00" * 16})
    p.compute(key("t"), [3])
    d.load(key("t"), p.address, [10])
    assert not d.result().failed_blocks
    assert "not the prefill engine's memory" in d.connections.transports.running()[p.address]


def test_a_prefill_without_ipc_says_why(prefill: Make, decode: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "why_unavailable", lambda: "this system has no process_vm_readv")
    p = ipc_prefill(prefill)
    monkeypatch.undo()
    d = ipc_decode(decode)
    assert p.context.transports() == ["tcp"]
    p.compute(key("t"), [3])
    d.load(key("t"), p.address, [10])
    assert not d.result().failed_blocks
    assert d.connections.transports.running() == {
        p.address: "tcp; ipc not used: this system has no process_vm_readv (on prefill)"
    }


@pytest.mark.parametrize("older", ["prefill", "decode"])
def test_an_engine_of_an_older_release_uses_tcp(
    pair: tuple[Prefill, Decode], monkeypatch: pytest.MonkeyPatch, older: str
) -> None:
    p, d = pair
    engine = p if older == "prefill" else d
    monkeypatch.setattr(engine.context, "place", Place())
    p.compute(key("t"), [3])
    d.load(key("t"), p.address, [10])
    assert not d.result().failed_blocks
    assert d.connections.transports.running()[p.address].startswith("tcp")


def test_an_engine_that_does_not_want_ipc_uses_tcp(prefill: Make, decode: Make) -> None:
    p, d = prefill(cache=AddressCache()), ipc_decode(decode)
    p.compute(key("t"), [3])
    d.load(key("t"), p.address, [10])
    assert not d.result().failed_blocks


def test_an_acknowledgement_that_nobody_waits_for_ends_the_connection(pair: tuple[Prefill, Decode]) -> None:
    p, d = pair
    p.compute(key("t"), [3])
    d.load(key("t"), p.address, [10])
    assert not d.result().failed_blocks
    (connection,) = d.connections._connections.values()
    connection.enqueue(encode(Kind.DONE, {}))
    _wait(lambda: p.server.connections() == 0)


def test_a_block_outside_prefills_cache_is_not_read(
    pair: tuple[Prefill, Decode], caplog: pytest.LogCaptureFixture
) -> None:
    p, d = pair
    p.send_queue.open(key("t"), "r", 1)
    p.send_queue.progress("r", [64], 1, None)
    d.load(key("t"), p.address, [10])
    assert d.result().failed_blocks == {10}
    _wait(lambda: "block 64 of a cache of 64 blocks" in caplog.text)


def test_block_ids_are_little_endian() -> None:
    assert encode_ids([1, 258]) == b"\1\0\0\0\2\1\0\0"
    assert list(decode_ids(encode_ids(range(300)))) == list(range(300))


@pytest.mark.parametrize("change", [
    {"planes": None}, {"planes": [[0, 1, 8]] * 2}, {"planes": [[1, 1, 8]] * 3}, {"planes": [[0, -1, 8]] * 3},
    {"planes": [[0, 1, 0]] * 3}, {"planes": [[0, True, 8]] * 3}, {"planes": [[0, 1]] * 3},
    {"blocks": 0}, {"blocks": "4"}, {"nonce": "00"}, {"nonce": None}, {"nonce": "zz" * 16},
])  # fmt: skip
def test_a_malformed_description_of_memory_is_refused(change: dict[str, Any]) -> None:
    memory: dict[str, Any] = {"planes": [[0, 1, 8]] * 3, "blocks": 4, "nonce": "00" * 16}

    def read() -> None:
        read_planes(memory, 3, 1), read_num_blocks(memory), read_nonce(memory)

    read()
    memory |= change
    with pytest.raises(WireError):
        read()


@pytest.mark.parametrize("change", [{"pid": 0}, {"pid": True}, {"pid": None}, {"probe": 0}, {"probe": "x"}])
def test_a_malformed_description_of_a_process_is_refused(change: dict[str, Any]) -> None:
    cache = AddressCache()
    with pytest.raises(WireError):
        ProcessMemoryReader(cache, {**ExportedProcessMemory(cache).describe(), **change})
