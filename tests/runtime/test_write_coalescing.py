"""Writes within one event loop iteration."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from disagg_proxy.errors import EngineDisconnected
from disagg_proxy.runtime.write_coalescing import WriteBatch, WriteCoalescer
from disagg_proxy.upstream import ReadUntil
from disagg_proxy.upstream.connection import Connection
from tests.upstream.pool import Pool


class Wire:
    """A transport that logs its calls, in one list for all transports."""

    def __init__(self, name: str, log: list[tuple[str, Any]]) -> None:
        self.name = name
        self.log = log
        self.closing = self.gone = False

    def write(self, data: bytes) -> None:
        assert not self.closing
        self.log.append((self.name, data))

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True
        self.log.append((self.name, "close"))

    def abort(self) -> None:
        self.closing = True
        self.log.append((self.name, "abort"))

    def write_eof(self) -> None:
        if self.gone:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        self.log.append((self.name, "eof"))

    def set_protocol(self, protocol: object) -> None:
        self.log.append((self.name, "protocol"))


class Bench:
    """Three transports with one batch."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.write_batch = WriteBatch()
        self.wires = [Wire(name, self.log) for name in "abc"]
        self.a, self.b, self.c = (WriteCoalescer(wire, self.write_batch) for wire in self.wires)  # type: ignore[arg-type]


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def next_iteration() -> None:
    await asyncio.sleep(0)


async def test_the_first_write_leaves_at_once_and_the_others_at_the_end_of_the_iteration(bench: Bench) -> None:
    bench.a.write(b"1")
    assert bench.log == [("a", b"1")]
    bench.b.write(b"2")
    bench.a.write(b"3")
    bench.c.write(b"4")
    assert len(bench.log) == 1
    await next_iteration()
    assert bench.log == [("a", b"1"), ("b", b"2"), ("a", b"3"), ("c", b"4")]
    assert bench.a.batched == bench.b.batched == bench.c.batched == 0


async def test_each_iteration_has_a_first_write(bench: Bench) -> None:
    for number in range(3):
        bench.a.write(b"%d" % number)
        assert bench.log.pop() == ("a", b"%d" % number)
        await next_iteration()
    assert not bench.log


async def test_consecutive_writes_of_one_transport_are_joined(bench: Bench) -> None:
    bench.a.write(b"1")
    for data in (b"token", b"end"):
        bench.b.write(data)
    bench.c.write(b"2")
    bench.b.write(b"next")
    await next_iteration()
    assert bench.log[1:] == [("b", b"tokenend"), ("c", b"2"), ("b", b"next")]


async def test_a_batch_is_flushed_after_64_writes(bench: Bench) -> None:
    bench.a.write(b"first")
    for number in range(64):
        assert len(bench.log) == 1
        (bench.a, bench.b)[number % 2].write(b"x")
    assert len(bench.log) == 65
    bench.c.write(b"y")
    assert len(bench.log) == 65
    await next_iteration()
    assert len(bench.log) == 66


async def test_a_batch_is_flushed_after_256_kib(bench: Bench) -> None:
    bench.a.write(b"first")
    bench.b.write(b"x" * 200_000)
    assert len(bench.log) == 1
    bench.b.write(b"y" * 100_000)
    assert bench.log[1:] == [("b", b"x" * 200_000 + b"y" * 100_000)]


async def test_a_write_above_the_limit_is_not_copied(bench: Bench) -> None:
    bench.a.write(b"first")
    body = b"x" * 300_000
    bench.c.write(b"other")
    bench.b.write(b"head")
    bench.b.write(body)
    bench.b.write(b"tail")
    assert bench.log[1:] == [("c", b"other"), ("b", b"head"), ("b", body)]
    assert bench.log[-1][1] is body
    await next_iteration()
    assert bench.log[4:] == [("b", b"tail")]


@pytest.mark.parametrize(
    ("end", "logged"),
    [("close", "close"), ("write_eof", "eof"), ("set_protocol", "protocol")],
)
async def test_batched_writes_leave_before_the_end(bench: Bench, end: str, logged: str) -> None:
    bench.a.write(b"1")
    bench.b.write(b"2")
    bench.a.write(b"3")
    getattr(bench.a, end)(*([asyncio.Protocol()] if end == "set_protocol" else []))
    assert bench.log == [("a", b"1"), ("b", b"2"), ("a", b"3"), ("a", logged)]


async def test_an_end_after_the_peer_has_closed_is_an_abort(bench: Bench) -> None:
    bench.wires[0].gone = True
    bench.a.write(b"1")
    bench.a.write_eof()
    assert bench.log == [("a", b"1"), ("a", "abort")]


async def test_an_abort_loses_batched_writes_of_its_own_transport_only(bench: Bench) -> None:
    bench.a.write(b"1")
    for one in (bench.a, bench.b, bench.c):
        one.write(b"2")
    bench.a.abort()
    bench.wires[1].closing = True
    await next_iteration()
    assert bench.log == [("a", b"1"), ("a", "abort"), ("c", b"2")]


@pytest.mark.parametrize("sent", [False, True])
async def test_a_batched_request_counts_as_unsent_when_its_connection_breaks(bench: Bench, sent: bool) -> None:
    connection = Connection("here:1", True, Pool(bench.write_batch))
    connection.connection_made(bench.wires[0])  # type: ignore[arg-type]
    bench.b.write(b"the iteration's first")
    answer = connection.send(b"head", b"body", 60.0, "decode")
    if sent:
        await next_iteration()
    connection.connection_lost(ConnectionResetError())
    with pytest.raises(EngineDisconnected) as caught:
        await answer.wait_until(ReadUntil.HEAD)
    assert caught.value.unsent is not sent
    assert (("a", b"headbody") in bench.log) is sent
