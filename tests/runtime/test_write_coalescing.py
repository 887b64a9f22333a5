"""What is written in one turn of the event loop."""

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
    """A transport that notes what it is told, in one list for all."""

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


class Desk:
    """Three transports with one outbox."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.write_batch = WriteBatch()
        self.wires = [Wire(name, self.log) for name in "abc"]
        self.a, self.b, self.c = (WriteCoalescer(wire, self.write_batch) for wire in self.wires)  # type: ignore[arg-type]


@pytest.fixture
async def desk() -> Desk:
    return Desk()


async def turn() -> None:
    await asyncio.sleep(0)


async def test_the_first_write_leaves_at_once_and_the_others_at_the_end_of_the_turn(desk: Desk) -> None:
    desk.a.write(b"1")
    assert desk.log == [("a", b"1")]
    desk.b.write(b"2")
    desk.a.write(b"3")
    desk.c.write(b"4")
    assert len(desk.log) == 1
    await turn()
    assert desk.log == [("a", b"1"), ("b", b"2"), ("a", b"3"), ("c", b"4")]
    assert desk.a.held == desk.b.held == desk.c.held == 0


async def test_so_it_is_in_the_next_turn(desk: Desk) -> None:
    for number in range(3):
        desk.a.write(b"%d" % number)
        assert desk.log.pop() == ("a", b"%d" % number)
        await turn()
    assert not desk.log


async def test_what_follows_each_other_for_one_leaves_in_one_write(desk: Desk) -> None:
    desk.a.write(b"1")
    for data in (b"token", b"end"):
        desk.b.write(data)
    desk.c.write(b"2")
    desk.b.write(b"next")
    await turn()
    assert desk.log[1:] == [("b", b"tokenend"), ("c", b"2"), ("b", b"next")]


async def test_a_turn_that_has_much_to_write_lets_go_of_it(desk: Desk) -> None:
    desk.a.write(b"first")
    for number in range(64):
        assert len(desk.log) == 1
        (desk.a, desk.b)[number % 2].write(b"x")
    assert len(desk.log) == 65
    desk.c.write(b"y")
    assert len(desk.log) == 65
    await turn()
    assert len(desk.log) == 66


async def test_long_prompts_are_not_held(desk: Desk) -> None:
    desk.a.write(b"first")
    desk.b.write(b"x" * 200_000)
    assert len(desk.log) == 1
    desk.b.write(b"y" * 100_000)
    assert desk.log[1:] == [("b", b"x" * 200_000 + b"y" * 100_000)]


async def test_the_longest_are_not_copied_either(desk: Desk) -> None:
    desk.a.write(b"first")
    body = b"x" * 300_000
    desk.c.write(b"other")
    desk.b.write(b"head")
    desk.b.write(body)
    desk.b.write(b"tail")
    assert desk.log[1:] == [("c", b"other"), ("b", b"head"), ("b", body)]
    assert desk.log[-1][1] is body
    await turn()
    assert desk.log[4:] == [("b", b"tail")]


@pytest.mark.parametrize(
    ("end", "said"),
    [("close", "close"), ("write_eof", "eof"), ("set_protocol", "protocol")],
)
async def test_what_was_written_before_the_end_goes_before_it(desk: Desk, end: str, said: str) -> None:
    desk.a.write(b"1")
    desk.b.write(b"2")
    desk.a.write(b"3")
    getattr(desk.a, end)(*([asyncio.Protocol()] if end == "set_protocol" else []))
    assert desk.log == [("a", b"1"), ("b", b"2"), ("a", b"3"), ("a", said)]


async def test_an_end_for_somebody_who_is_gone_is_an_abort(desk: Desk) -> None:
    desk.wires[0].gone = True
    desk.a.write(b"1")
    desk.a.write_eof()
    assert desk.log == [("a", b"1"), ("a", "abort")]


async def test_an_abort_loses_what_is_held_and_nothing_of_others(desk: Desk) -> None:
    desk.a.write(b"1")
    for one in (desk.a, desk.b, desk.c):
        one.write(b"2")
    desk.a.abort()
    desk.wires[1].closing = True
    await turn()
    assert desk.log == [("a", b"1"), ("a", "abort"), ("c", b"2")]


@pytest.mark.parametrize("left", [False, True])
async def test_a_request_that_has_not_left_when_its_connection_breaks_was_not_sent(desk: Desk, left: bool) -> None:
    connection = Connection("here:1", True, Pool(desk.write_batch))
    connection.connection_made(desk.wires[0])  # type: ignore[arg-type]
    desk.b.write(b"the turn's first")
    answer = connection.send(b"head", b"body", 60.0, "decode")
    if left:
        await turn()
    connection.connection_lost(ConnectionResetError())
    with pytest.raises(EngineDisconnected) as caught:
        await answer.until(ReadUntil.HEAD)
    assert caught.value.unsent is not left
    assert (("a", b"headbody") in desk.log) is left
