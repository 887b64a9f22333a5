"""One body on its way to the client: poured into an outlet, and pulled."""

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
BROKEN = EngineDisconnected("broken", unsent=False, reused=False)
OVER = None

Script = bytes | EngineDisconnected | None
"""A piece, a break, or the end."""


class Carrier:
    """The connection under decode's answer: says the next of its script for as long as it is read."""

    def __init__(self, *script: Script) -> None:
        self.answer = Response(self, "decode", reused=False)
        self.answer.begun(200, ResponseHeaders())
        self.script = deque(script)
        self.paused = self.aborted = False

    def say(self) -> None:
        """All that is left, up to a pause."""
        while self.script and not self.paused and not self.aborted:
            what = self.script.popleft()
            if isinstance(what, bytes):
                self.answer.received(what)
            elif what is OVER:
                self.answer.ended()
            else:
                self.answer.broke(what)

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False
        asyncio.get_running_loop().call_soon(self.say)

    def abort(self) -> None:
        self.aborted = True


class Outlet:
    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.ends: list[str] = []
        self.chunks: list[bytes] = []
        self.pass_on = self.chunks.append
        self.at_end: Callable[[], None] = lambda: None

    def write(self, piece: bytes) -> None:
        assert piece and not self.ends
        self.pieces.append(piece)

    def end(self) -> None:
        self.at_end()
        self.ends.append("end")

    def cut(self, cause: StreamCut) -> None:
        self.ends.append(str(cause))

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


class Relayed:
    """A relay and what it has reported."""

    def __init__(self, *script: Script, cached: int | None = 0) -> None:
        self.carrier = Carrier(*script)
        self.progress = ProgressTracker(0.0)
        self.pending = self.progress.begin(lambda: 0.0)
        self.ended: list[bool] = []
        self.outlet = Outlet()
        hider, repair = RequestIdRewriter(ID), UsageRepair(CHAT, None if cached is None else CachedTokens(cached))
        self.record = RequestRecorder.alone().open("/v1/completions", None)
        self.relay = ResponseStream(self.carrier.answer, hider, repair, self.pending, self.record)
        self.pending.answer = self.carrier.answer
        self.work = InlineCoroutine(self._follow(), lambda work, error: None)
        self.work.start()

    async def _follow(self) -> None:
        await self.relay.finished
        self.ended.append(self.relay.complete)

    def pour(self) -> Outlet:
        self.relay.pour(self.outlet)
        self.carrier.say()
        return self.outlet

    async def pull(self) -> bytes:
        asyncio.get_running_loop().call_soon(self.carrier.say)
        return b"".join([piece async for piece in self.relay])


async def test_a_body_that_comes_to_its_end() -> None:
    relayed = Relayed(b"data: 1\n\n", b"data: 2\n\n", OVER)
    outlet = relayed.pour()
    assert (outlet.pieces, outlet.ends) == ([b"data: 1\n\n", b"data: 2\n\n"], ["end"]), "as it came, unglued"
    assert (relayed.progress.outputs, relayed.ended) == (2, [True])
    relayed.relay.close()
    assert (relayed.ended, relayed.carrier.aborted) == ([True], False)


async def test_what_had_come_before_it_is_poured_goes_first() -> None:
    relayed = Relayed(b"data: 1\n\n", b"data: 2\n\n", OVER)
    relayed.carrier.say()
    assert not relayed.outlet.pieces
    outcomes: list[str] = []
    relayed.outlet.at_end = lambda: outcomes.append(relayed.record.outcome)
    outlet = relayed.pour()
    assert outcomes == ["ok"], "the end of the exchange closes the record"
    assert (outlet.body, outlet.ends, relayed.ended) == (b"data: 1\n\ndata: 2\n\n", ["end"], [True])


async def test_pulled_it_is_the_same_body() -> None:
    relayed = Relayed(b"data: 1\n\n", b"data: 2\n\n", OVER)
    assert await soon(relayed.pull()) == b"data: 1\n\ndata: 2\n\n"
    assert relayed.ended == [True]


@pytest.mark.parametrize("size", [1, 3, 50, 1000])
@pytest.mark.parametrize("pulled", [False, True])
async def test_the_internal_id_is_hidden_wherever_it_is_split(size: int, pulled: bool) -> None:
    body = b'data: {"id": "cmpl-%s-0"}\n\n' % ID.internal.encode() * 3
    relayed = Relayed(*(body[at : at + size] for at in range(0, len(body), size)), OVER)
    got = await soon(relayed.pull()) if pulled else relayed.pour().body
    assert got == body.replace(ID.internal.encode(), ID.public.encode())


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_cached_tokens_are_set_right_wherever_they_are_split(size: int) -> None:
    body = b'data: {"usage":{"prompt_tokens_details":{"cached_tokens":%d}}}\n\n'
    told = body % 99
    relayed = Relayed(*(told[at : at + size] for at in range(0, len(told), size)), OVER, cached=3)
    assert relayed.pour().body == body % 3


async def test_a_piece_that_may_begin_an_id_is_held_back_but_not_lost_at_the_end() -> None:
    relayed = Relayed(b"data: __", b"_prefill_addr_", OVER)
    outlet = relayed.pour()
    assert (outlet.pieces, outlet.ends) == ([b"data: ", b"___prefill_addr_"], ["end"])


async def test_a_break_is_a_cut_and_nothing_is_added() -> None:
    relayed = Relayed(b"data: 1\n\n___pre", BROKEN)
    outlet = relayed.pour()
    assert (outlet.pieces, outlet.ends) == ([b"data: 1\n\n"], ["broken"])
    assert relayed.ended == [False]


async def test_a_break_is_raised_behind_what_came_before_it_where_it_is_pulled() -> None:
    relayed = Relayed(b"data: 1\n\n", BROKEN)
    pieces = []
    relayed.carrier.say()
    with pytest.raises(StreamCut, match="broken"):
        async for piece in relayed.relay:
            pieces.append(piece)
    assert pieces == [b"data: 1\n\n"] and relayed.ended == [False]


async def test_an_empty_body_is_whole_but_decode_has_said_nothing() -> None:
    relayed = Relayed(OVER)
    outlet = relayed.pour()
    assert (outlet.pieces, outlet.ends) == ([], ["end"])
    assert (relayed.pending.begun, relayed.ended) == (False, [True])


async def test_giving_up_closes_the_answer_and_is_reported_once() -> None:
    relayed = Relayed(b"data: 1\n\n")
    outlet = relayed.pour()
    relayed.relay.close()
    relayed.relay.close()
    assert (relayed.ended, relayed.carrier.aborted) == ([False], True)
    assert outlet.ends == [], "its owner knows, and has nobody to tell"
    relayed.relay.feed(b"late")
    relayed.relay.end()
    assert (outlet.body, relayed.ended) == (b"data: 1\n\n", [False])


async def test_a_stalled_decode_cuts_the_stream_and_closes_the_answer() -> None:
    relayed = Relayed(b"data: 1\n\n")
    outlet = relayed.pour()
    relayed.pending.fail(EngineFrozen("stalled"))
    assert relayed.carrier.aborted and relayed.ended == [False]
    assert outlet.ends == ["stalled"] and relayed.record.cause == "engine_frozen"


async def test_a_stall_before_the_body_is_read_cuts_it_when_it_is() -> None:
    relayed = Relayed()
    relayed.pending.fail(EngineFrozen("stalled"))
    assert relayed.ended == []
    assert relayed.pour().ends == ["stalled"] and relayed.ended == [False]


async def test_decode_is_waited_for_unless_the_client_is_behind() -> None:
    relayed = Relayed(b"data: 1\n\n")
    outlet = relayed.pour()
    assert relayed.progress.waiting() == [relayed.pending]
    relayed.relay.pause()
    relayed.carrier.script.append(b"data: 2\n\n")
    relayed.carrier.say()
    assert relayed.progress.waiting() == [] and relayed.carrier.paused and outlet.body == b"data: 1\n\n"
    relayed.relay.resume()
    assert relayed.progress.waiting() == [relayed.pending]
    await asyncio.sleep(0)
    assert outlet.body == b"data: 1\n\ndata: 2\n\n"


async def test_what_was_read_already_still_passes_while_the_client_is_behind() -> None:
    relayed = Relayed()
    outlet = relayed.pour()
    relayed.relay.pause()
    relayed.relay.feed(b"data: 1\n\n")
    assert outlet.body == b"data: 1\n\n"
    assert relayed.progress.waiting() == [], "nobody waits for decode only because it has spoken"


async def test_a_client_that_catches_up_after_the_end_wakes_nothing() -> None:
    relayed = Relayed(OVER)
    relayed.relay.pause()
    relayed.carrier.paused = False
    relayed.pour()
    relayed.pending.end()
    relayed.relay.resume()
    assert relayed.progress.waiting() == [] and relayed.ended == [True]


async def test_one_that_pulls_slowly_stops_decode_and_gets_everything() -> None:
    pieces = [b"%d" % n * 10_000 + b"\n" for n in range(10)] * 3
    relayed = Relayed(*pieces, OVER)
    pulled = aiter(relayed.relay)
    waiting = asyncio.ensure_future(anext(pulled))
    await asyncio.sleep(0)
    relayed.carrier.say()
    assert relayed.carrier.paused and relayed.progress.waiting() == [], "64 KiB wait for the reader, not everything"
    assert len(relayed.carrier.script) > len(pieces) / 2
    got = [await soon(waiting)]
    async for piece in pulled:
        got.append(piece)
    assert b"".join(got) == b"".join(pieces) and relayed.ended == [True]


async def test_a_reader_that_stops_pulling_leaves_the_end_to_its_owner() -> None:
    relayed = Relayed(b"data: 1\n\n")
    waiting = asyncio.ensure_future(relayed.pull())
    for _ in range(3):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert relayed.ended == [] and not relayed.carrier.aborted
    relayed.relay.close()
    assert relayed.ended == [False] and relayed.carrier.aborted


def framed(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


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
async def test_chunks_go_on_with_their_framing(chunks: bytes, passed: bytes) -> None:
    relayed = Relayed()
    outlet = relayed.pour()
    assert relayed.relay.feed_chunks(chunks)
    relayed.relay.end()
    assert (outlet.chunks, outlet.body) == ([passed], b"")
    assert relayed.progress.outputs == 1


async def test_chunks_with_usage_must_come_without_their_framing() -> None:
    relayed = Relayed()
    outlet = relayed.pour()
    assert not relayed.relay.feed_chunks(framed(b"1\n", b'data: {"prompt_tokens_details":null}\n\n'))
    assert not outlet.chunks and not outlet.pieces and relayed.progress.outputs == 0


@pytest.mark.parametrize("tail", [ID.internal[:9].encode(), b'"prompt_tok'], ids=["id", "usage"])
async def test_so_must_chunks_behind_a_held_tail(tail: bytes) -> None:
    relayed = Relayed()
    outlet = relayed.pour()
    relayed.relay.feed(tail)
    assert not relayed.relay.feed_chunks(framed(b"\n"))
    relayed.relay.feed(b"\n")
    assert (outlet.body, outlet.chunks) == (tail + b"\n", [])
    assert relayed.relay.feed_chunks(framed(b"\n"))


async def test_after_the_end_chunks_go_nowhere() -> None:
    relayed = Relayed()
    outlet = relayed.pour()
    relayed.relay.close()
    assert not relayed.relay.feed_chunks(framed(b"1\n"))
    assert not outlet.chunks and not outlet.pieces
