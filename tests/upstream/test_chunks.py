"""A chunked answer, however its bytes are cut on their way and whoever takes its framing off."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.runtime.write_coalescing import WriteBatch
from disagg_proxy.upstream.connection import Connection
from tests.upstream.pool import Pool

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Transport:
    def __init__(self) -> None:
        self.aborted = False

    def write(self, data: bytes) -> None: ...

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


class Sink:
    def __init__(self) -> None:
        self.body = b""
        self.chunks = 0
        self.over = ""

    def feed(self, payload: bytes) -> None:
        assert payload and not self.over
        self.body += payload

    def feed_chunks(self, chunks: bytes) -> bool:
        if b"parse me" in chunks:
            return False
        while chunks:
            self.chunks += 1
            digits, _, rest = chunks.partition(b"\r\n")
            size = int(digits, 16)
            assert rest[size - 1 : size + 2] == b"\n\r\n"
            self.feed(rest[:size])
            chunks = rest[size + 2 :]
        return True

    def end(self) -> None:
        self.over = "end"

    def fail(self, error: Exception) -> None:
        self.over = type(error).__name__


class Exchange:
    """One answer on a connection without a socket."""

    def __init__(self) -> None:
        self.pool, self.transport, self.sink = Pool(WriteBatch()), Transport(), Sink()
        self.connection = Connection("here:1", True, self.pool)
        self.connection.connection_made(self.transport)  # type: ignore[arg-type]
        self.answer = self.connection.send(b"", b"", 60.0, "decode")

    def receive(self, *reads: bytes) -> Sink:
        """All reads after a head."""
        self.connection.data_received(HEAD)
        self.answer.pipe_to(self.sink)
        for data in reads:
            if not self.transport.aborted:
                self.connection.data_received(data)
        self.connection.abort()
        return self.sink


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


async def test_single_chunks_keep_their_framing() -> None:
    exchange = Exchange()
    events = [b"data: %d\n\n" % i for i in range(5)]
    sink = exchange.receive(*map(chunk, events), b"0\r\n\r\n")
    assert (sink.body, sink.over, exchange.pool.free) == (b"".join(events), "end", 1)
    assert sink.chunks == 4, "all but the first, behind which the parser first stands between two"


async def test_several_chunks_keep_their_framing() -> None:
    exchange = Exchange()
    events = [b"data: %d\n\n" % i for i in range(7)]
    one, *others = map(chunk, events)
    sink = exchange.receive(one, b"".join(others[:3]), b"".join(others[3:]) + b"0\r\n\r\n")
    assert (sink.body, sink.over, exchange.pool.free) == (b"".join(events), "end", 1)
    assert sink.chunks == 3, "what comes together with the end is parsed"


async def test_chunks_that_the_sink_rejects_are_parsed() -> None:
    exchange = Exchange()
    events = [b"1\n", b"parse me\n", b"2\n", b"3\n"]
    sink = exchange.receive(*map(chunk, events), b"0\r\n\r\n")
    assert (sink.body, sink.over, exchange.pool.free) == (b"".join(events), "end", 1)
    assert sink.chunks == 2


@pytest.mark.parametrize(
    "reads",
    [
        (chunk(b"a\n"), b"6\r\n1\r\nx\r\n", b"\r\n", b"0\r\n\r\n"),
        (chunk(b"a\n"), b"c\r\n\n\r\n", b"1\r\nx\r\n", b"\n\n\n\r\n", b"0\r\n\r\n"),
        (chunk(b"a\n"), chunk(b"b\n") + b"6", b"\r\n1\r\nb\r\n\r\n", b"0\r\n\r\n"),
    ],
    ids=["looks like a chunk in two", "looks like one within one", "a size in two"],
)
async def test_data_that_looks_like_a_chunk(reads) -> None:
    exchange = Exchange()
    sink = exchange.receive(*reads)
    plain = Exchange().receive(b"".join(reads))
    assert (sink.body, sink.over) == (plain.body, plain.over) and sink.over == "end"


async def test_an_invalid_size_fails_the_response() -> None:
    sink = Exchange().receive(chunk(b"a\n"), chunk(b"b\n"), b"zz\r\nx\r\n")
    assert (sink.body, sink.over) == (b"a\nb\n", "EngineDisconnected")


_bodies = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=30), st.sampled_from([b"\n", b"\r\n", b"\n\r\n1\r\nx\r\n", b"1\r\nx\r\n"])
    ),
    min_size=1,
    max_size=8,
)


@given(_bodies, st.lists(st.integers(0, 400), max_size=12), st.booleans())
async def test_any_split_into_reads(bodies: list[bytes], cuts: list[int], upper: bool) -> None:
    form = b"%X\r\n%b\r\n" if upper else b"%x\r\n%b\r\n"
    wire = b"".join(form % (len(payload), payload) for payload in bodies) + b"0\r\n\r\n"
    ends = sorted({cut for cut in cuts if 0 < cut < len(wire)})
    reads = [wire[a:b] for a, b in zip([0, *ends], [*ends, len(wire)], strict=True)]
    exchange = Exchange()
    sink = exchange.receive(*reads)
    assert (sink.body, sink.over, exchange.pool.free) == (b"".join(bodies), "end", 1)


@given(_bodies, st.data())
async def test_chunks_joined_or_split_across_reads(bodies: list[bytes], data: st.DataObject) -> None:
    reads = [b""]
    for payload in bodies:
        for part in (chunk(payload)[:2], chunk(payload)[2:]) if data.draw(st.booleans()) else (chunk(payload),):
            if data.draw(st.booleans()):
                reads[-1] += part
            else:
                reads.append(part)
    sink = Exchange().receive(*filter(None, reads), b"0\r\n\r\n")
    assert (sink.body, sink.over) == (b"".join(bodies), "end")
