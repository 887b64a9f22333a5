"""One body on its way to the client: piped to a sink, and iterated."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import pytest

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.progress import ProgressTracker
from disagg_proxy.downstream.response_stream import ResponseStream
from disagg_proxy.errors import EngineDisconnected, EngineFrozen, StreamCut
from disagg_proxy.http1.headers import ResponseHeaders
from disagg_proxy.openai.fields import CHAT
from disagg_proxy.openai.usage import CachedTokens, UsageRepair
from disagg_proxy.request_id import RequestIdRewriter, new_request_id
from disagg_proxy.runtime.inline_coroutine import InlineCoroutine
from disagg_proxy.telemetry.request_recorder import RequestRecorder
from disagg_proxy.upstream import Response
from tests.conftest import soon

ID = new_request_id(parse_address("127.0.0.1:1"), parse_address("127.0.0.1:2"))
DISCONNECTED = EngineDisconnected("broken", unsent=False, reused=False)
END = None

Script = bytes | EngineDisconnected | None
"""A data, a break, or the end."""


class FakeConnection:
    """The connection under decode's answer: says the next of its script for as long as it is read."""

    def __init__(self, *script: Script) -> None:
        self.answer = Response(self, "decode", reused=False)
        self.answer.on_head(200, ResponseHeaders())
        self.script = deque(script)
        self.paused = self.aborted = False

    def say(self) -> None:
        """All that is left, up to a pause."""
        while self.script and not self.paused and not self.aborted:
            what = self.script.popleft()
            if isinstance(what, bytes):
                self.answer.on_data(what)
            elif what is END:
                self.answer.on_end()
            else:
                self.answer.on_error(what)

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False
        asyncio.get_running_loop().call_soon(self.say)

    def abort(self) -> None:
        self.aborted = True


class RecordingSink:
    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.ends: list[str] = []
        self.chunks: list[bytes] = []
        self.write_framed = self.chunks.append
        self.at_end: Callable[[], None] = lambda: None

    def write(self, data: bytes) -> None:
        assert data and not self.ends
        self.written.append(data)

    def end(self) -> None:
        self.at_end()
        self.ends.append("end")

    def cut(self, cause: StreamCut) -> None:
        self.ends.append(str(cause))

    @property
    def body(self) -> bytes:
        return b"".join(self.written)


class Streamed:
    """A stream and what it has reported."""

    def __init__(self, *script: Script, cached: int | None = 0) -> None:
        self.connection = FakeConnection(*script)
        self.progress = ProgressTracker(0.0)
        self.pending = self.progress.begin(lambda: 0.0)
        self.ended: list[bool] = []
        self.sink = RecordingSink()
        rewriter, repair = RequestIdRewriter(ID), UsageRepair(CHAT, None if cached is None else CachedTokens(cached))
        self.record = RequestRecorder.standalone().open("/v1/completions", None)
        self.stream = ResponseStream(self.connection.answer, rewriter, repair, self.pending, self.record)
        self.pending.answer = self.connection.answer
        self.work = InlineCoroutine(self._follow(), lambda work, error: None)
        self.work.start()

    async def _follow(self) -> None:
        await self.stream.finished
        self.ended.append(self.stream.complete)

    def pipe_to(self) -> RecordingSink:
        self.stream.pipe_to(self.sink)
        self.connection.say()
        return self.sink

    async def iterate(self) -> bytes:
        asyncio.get_running_loop().call_soon(self.connection.say)
        return b"".join([data async for data in self.stream])


async def test_a_complete_body() -> None:
    streamed = Streamed(b"data: 1\n\n", b"data: 2\n\n", END)
    sink = streamed.pipe_to()
    assert (sink.written, sink.ends) == ([b"data: 1\n\n", b"data: 2\n\n"], ["end"]), "as it came, unglued"
    assert (streamed.progress.outputs, streamed.ended) == (2, [True])
    streamed.stream.close()
    assert (streamed.ended, streamed.connection.aborted) == ([True], False)


async def test_data_from_before_the_piping_goes_first() -> None:
    streamed = Streamed(b"data: 1\n\n", b"data: 2\n\n", END)
    streamed.connection.say()
    assert not streamed.sink.written
    outcomes: list[str] = []
    streamed.sink.at_end = lambda: outcomes.append(streamed.record.outcome)
    sink = streamed.pipe_to()
    assert outcomes == ["ok"], "the end of the exchange closes the record"
    assert (sink.body, sink.ends, streamed.ended) == (b"data: 1\n\ndata: 2\n\n", ["end"], [True])


async def test_iterating_yields_the_same_body() -> None:
    streamed = Streamed(b"data: 1\n\n", b"data: 2\n\n", END)
    assert await soon(streamed.iterate()) == b"data: 1\n\ndata: 2\n\n"
    assert streamed.ended == [True]


@pytest.mark.parametrize("size", [1, 3, 50, 1000])
@pytest.mark.parametrize("iterated", [False, True])
async def test_the_internal_id_is_replaced_wherever_it_is_split(size: int, iterated: bool) -> None:
    body = b'data: {"id": "cmpl-%s-0"}\n\n' % ID.internal.encode() * 3
    streamed = Streamed(*(body[at : at + size] for at in range(0, len(body), size)), END)
    got = await soon(streamed.iterate()) if iterated else streamed.pipe_to().body
    assert got == body.replace(ID.internal.encode(), ID.public.encode())


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_cached_tokens_are_corrected_wherever_they_are_split(size: int) -> None:
    body = b'data: {"usage":{"prompt_tokens_details":{"cached_tokens":%d}}}\n\n'
    told = body % 99
    streamed = Streamed(*(told[at : at + size] for at in range(0, len(told), size)), END, cached=3)
    assert streamed.pipe_to().body == body % 3


async def test_a_possible_prefix_of_an_id_is_held_and_sent_at_the_end() -> None:
    streamed = Streamed(b"data: __", b"_prefill_addr_", END)
    sink = streamed.pipe_to()
    assert (sink.written, sink.ends) == ([b"data: ", b"___prefill_addr_"], ["end"])


async def test_a_disconnect_is_a_cut_and_nothing_is_added() -> None:
    streamed = Streamed(b"data: 1\n\n___pre", DISCONNECTED)
    sink = streamed.pipe_to()
    assert (sink.written, sink.ends) == ([b"data: 1\n\n"], ["broken"])
    assert streamed.ended == [False]


async def test_iterating_raises_a_disconnect_after_the_data_before_it() -> None:
    streamed = Streamed(b"data: 1\n\n", DISCONNECTED)
    written = []
    streamed.connection.say()
    with pytest.raises(StreamCut, match="broken"):
        async for data in streamed.stream:
            written.append(data)
    assert written == [b"data: 1\n\n"] and streamed.ended == [False]


async def test_an_empty_body_is_complete_without_progress_of_decode() -> None:
    streamed = Streamed(END)
    sink = streamed.pipe_to()
    assert (sink.written, sink.ends) == ([], ["end"])
    assert (streamed.pending.begun, streamed.ended) == (False, [True])


async def test_close_closes_the_response_and_is_reported_once() -> None:
    streamed = Streamed(b"data: 1\n\n")
    sink = streamed.pipe_to()
    streamed.stream.close()
    streamed.stream.close()
    assert (streamed.ended, streamed.connection.aborted) == ([False], True)
    assert sink.ends == [], "its owner knows, and has nobody to tell"
    streamed.stream.feed(b"late")
    streamed.stream.end()
    assert (sink.body, streamed.ended) == (b"data: 1\n\n", [False])


async def test_a_stalled_decode_cuts_the_stream_and_closes_the_response() -> None:
    streamed = Streamed(b"data: 1\n\n")
    sink = streamed.pipe_to()
    streamed.pending.fail(EngineFrozen("stalled"))
    assert streamed.connection.aborted and streamed.ended == [False]
    assert sink.ends == ["stalled"] and streamed.record.cause == "engine_frozen"


async def test_a_stall_before_the_body_is_read_cuts_it_when_it_is_read() -> None:
    streamed = Streamed()
    streamed.pending.fail(EngineFrozen("stalled"))
    assert streamed.ended == []
    assert streamed.pipe_to().ends == ["stalled"] and streamed.ended == [False]


async def test_decode_is_not_waited_for_while_the_client_does_not_read() -> None:
    streamed = Streamed(b"data: 1\n\n")
    sink = streamed.pipe_to()
    assert streamed.progress.waiting() == [streamed.pending]
    streamed.stream.pause()
    streamed.connection.script.append(b"data: 2\n\n")
    streamed.connection.say()
    assert streamed.progress.waiting() == [] and streamed.connection.paused and sink.body == b"data: 1\n\n"
    streamed.stream.resume()
    assert streamed.progress.waiting() == [streamed.pending]
    await asyncio.sleep(0)
    assert sink.body == b"data: 1\n\ndata: 2\n\n"


async def test_data_already_read_still_passes_while_the_client_does_not_read() -> None:
    streamed = Streamed()
    sink = streamed.pipe_to()
    streamed.stream.pause()
    streamed.stream.feed(b"data: 1\n\n")
    assert sink.body == b"data: 1\n\n"
    assert streamed.progress.waiting() == [], "nobody waits for decode only because it has spoken"


async def test_a_resume_after_the_end_has_no_effect() -> None:
    streamed = Streamed(END)
    streamed.stream.pause()
    streamed.connection.paused = False
    streamed.pipe_to()
    streamed.pending.end()
    streamed.stream.resume()
    assert streamed.progress.waiting() == [] and streamed.ended == [True]


async def test_a_slow_iterating_reader_pauses_decode_and_gets_everything() -> None:
    written = [b"%d" % n * 10_000 + b"\n" for n in range(10)] * 3
    streamed = Streamed(*written, END)
    iterated = aiter(streamed.stream)
    waiting = asyncio.ensure_future(anext(iterated))
    await asyncio.sleep(0)
    streamed.connection.say()
    assert streamed.connection.paused and streamed.progress.waiting() == [], "64 KiB are buffered, not everything"
    assert len(streamed.connection.script) > len(written) / 2
    got = [await soon(waiting)]
    async for data in iterated:
        got.append(data)
    assert b"".join(got) == b"".join(written) and streamed.ended == [True]


async def test_a_reader_that_stops_iterating_leaves_the_stream_open() -> None:
    streamed = Streamed(b"data: 1\n\n")
    waiting = asyncio.ensure_future(streamed.iterate())
    for _ in range(3):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert streamed.ended == [] and not streamed.connection.aborted
    streamed.stream.close()
    assert streamed.ended == [False] and streamed.connection.aborted


def framed(*written: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(data), data) for data in written)


_INTERNAL, _PUBLIC = b"data: %b\n\n" % ID.internal.encode(), b"data: %b\n\n" % ID.public.encode()


@pytest.mark.parametrize(
    ("chunks", "passed"),
    [
        (framed(_INTERNAL), framed(_PUBLIC)),
        (framed(b"data: 1\n\n"), framed(b"data: 1\n\n")),
        (framed(_INTERNAL, b"\n", _INTERNAL), framed(_PUBLIC, b"\n", _PUBLIC)),
    ],
    ids=["id", "plain", "several"],
)
async def test_chunks_are_passed_on_with_their_framing(chunks: bytes, passed: bytes) -> None:
    streamed = Streamed()
    sink = streamed.pipe_to()
    assert streamed.stream.feed_chunks(chunks)
    streamed.stream.end()
    assert (sink.chunks, sink.body) == ([passed], b"")
    assert streamed.progress.outputs == 1


async def test_chunks_with_usage_are_needed_without_framing() -> None:
    streamed = Streamed()
    sink = streamed.pipe_to()
    assert not streamed.stream.feed_chunks(framed(b"1\n", b'data: {"prompt_tokens_details":null}\n\n'))
    assert not sink.chunks and not sink.written and streamed.progress.outputs == 0


@pytest.mark.parametrize("tail", [ID.internal[:9].encode(), b'"prompt_tok'], ids=["id", "usage"])
async def test_chunks_behind_a_held_tail_are_needed_without_framing(tail: bytes) -> None:
    streamed = Streamed()
    sink = streamed.pipe_to()
    streamed.stream.feed(tail)
    assert not streamed.stream.feed_chunks(framed(b"\n"))
    streamed.stream.feed(b"\n")
    assert (sink.body, sink.chunks) == (tail + b"\n", [])
    assert streamed.stream.feed_chunks(framed(b"\n"))


async def test_chunks_after_the_end_are_not_written() -> None:
    streamed = Streamed()
    sink = streamed.pipe_to()
    streamed.stream.close()
    assert not streamed.stream.feed_chunks(framed(b"1\n"))
    assert not sink.chunks and not sink.written
