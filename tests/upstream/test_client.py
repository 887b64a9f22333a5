"""One exchange with one instance: the outcome of everything a server may do, and which connection is used."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from disagg_proxy.errors import EngineDeadline, EngineDisconnected, EngineError, EngineUnreachable
from disagg_proxy.http1.headers import value_of
from disagg_proxy.runtime.write_coalescing import WriteBatch
from disagg_proxy.upstream import ReadUntil, Response, Upstream, client
from tests.conftest import soon
from tests.ports import hold_port
from tests.upstream.conftest import CLOSE, Ask, Server

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"
CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Sink:
    """Takes a body as it comes."""

    def __init__(self) -> None:
        self.body = b""
        self.came = asyncio.Event()
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def feed(self, piece: bytes) -> None:
        assert piece and not self.over.done()
        self.body += piece
        self.came.set()

    def feed_chunks(self, chunks: bytes) -> bool:
        return False

    def end(self) -> None:
        self.over.set_result("end")

    def fail(self, error: EngineError | EngineDeadline) -> None:
        self.over.set_result(type(error).__name__)


# -- complete responses, and the request


async def test_a_complete_response(server: Server, ask: Ask) -> None:
    server.answers = [OK]
    whole = await (await ask()).read_all()
    assert (whole.status, whole.body) == (200, b"{}")
    assert whole.headers == [(b"content-length", b"2"), (b"content-type", b"application/json")]


@pytest.mark.parametrize("until", list(ReadUntil)[1:])
async def test_the_requested_part_of_a_response_has_arrived(server: Server, ask: Ask, until: ReadUntil) -> None:
    head, body = OK.split(b"{")
    server.answers = [(head, b"{", body)]
    asking = asyncio.ensure_future(ask(until=until))
    for _ in range(until - ReadUntil.HEAD):
        await condition_met(lambda: len(server.asked) == 1)
        assert not asking.done()
        server.more.set()
        await condition_met(lambda: not server.more.is_set())
    answer = await soon(asking)
    assert answer.status == 200
    server.more.set()
    if until is not ReadUntil.COMPLETE:
        await condition_met(lambda: not server.more.is_set())
        server.more.set()
    assert (await soon(answer.read_all())).body == b"{" + body


async def condition_met(condition: Callable[[], bool]) -> None:
    async def look() -> None:
        while not condition():
            await asyncio.sleep(0)

    await soon(look())


async def test_the_client_adds_no_headers_of_its_own(server: Server, ask: Ask) -> None:
    server.answers = [OK]
    await (await ask()).read_all()
    assert server.asked[0][0] == b"GET /x HTTP/1.1\r\nhost: %b\r\n\r\n" % server.address.encode()


@pytest.mark.parametrize("body", [b"", b"{}", b"x" * 3_000_000])
async def test_headers_and_body_arrive_unchanged(server: Server, ask: Ask, body: bytes) -> None:
    server.answers = [OK]
    await (await ask(method="POST", headers=b"x: \xe9\r\nx: 2\r\n", body=body)).read_all()
    lines = b"host: %b\r\ncontent-length: %d\r\nx: \xe9\r\nx: 2\r\n\r\n" % (server.address.encode(), len(body))
    assert server.asked[0][0] == b"POST /x HTTP/1.1\r\n" + lines
    assert server.bodies == [body]


async def test_a_redirect_is_not_followed(server: Server, ask: Ask) -> None:
    server.answers = [b"HTTP/1.1 307 Temporary\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"]
    assert (await (await ask()).read_all()).status == 307
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [b"100 Continue", b"103 Early Hints"])
async def test_interim_responses_are_skipped(server: Server, ask: Ask, status: bytes) -> None:
    early = b"HTTP/1.1 %b\r\nLink: <x>\r\n\r\n" % status
    server.answers = [early + OK, (early, early + OK), OK]
    server.more.set()
    for _ in range(3):
        whole = await (await ask()).read_all()
        assert (whole.status, whole.body, value_of(whole.headers, b"link")) == (200, b"{}", b"")
    assert len(set(server.ports)) == 1


@pytest.mark.parametrize("status", [204, 304])
async def test_a_response_without_a_body(server: Server, ask: Ask, status: int) -> None:
    server.answers = [b"HTTP/1.1 %d X\r\n\r\n" % status, OK]
    assert (await (await ask()).read_all()).status == status
    assert (await (await ask()).read_all()).body == b"{}"
    assert len(set(server.ports)) == 1


async def test_chunks_and_dropped_trailers(server: Server, ask: Ask) -> None:
    server.answers = [CHUNKED + b"2;x=y\r\n{\n\r\n1\r\n}\r\n0\r\nX-Trailer: 1\r\n\r\n", OK]
    whole = await (await ask()).read_all()
    assert (whole.body, whole.headers) == (b"{\n}", [(b"transfer-encoding", b"chunked")])
    assert value_of((await (await ask()).read_all()).headers, b"x-trailer") == b""
    assert len(set(server.ports)) == 1


async def test_a_response_without_framing_ends_with_the_connection(server: Server, ask: Ask) -> None:
    server.answers = [(b"HTTP/1.1 200 OK\r\n\r\n{", b"}", CLOSE), OK]
    answer = await ask(until=ReadUntil.BODY_STARTED)
    reading = asyncio.ensure_future(answer.read_all())
    server.more.set()
    await condition_met(lambda: not server.more.is_set())
    server.more.set()
    assert (await soon(reading)).body == b"{}"
    await (await ask()).read_all()
    assert len(set(server.ports)) == 2


# -- which connection


async def test_connections_are_kept_and_a_fresh_one_is_not(server: Server, ask: Ask) -> None:
    server.answers = [OK] * 4
    for fresh in (False, False, True, False):
        await (await ask(fresh=fresh)).read_all()
    first, second, own, third = server.ports
    assert first == second == third != own


async def test_a_connection_in_use_is_not_shared(server: Server, ask: Ask) -> None:
    server.answers = [(OK[:-2], b"{}"), OK]
    first = await ask()
    await (await ask()).read_all()
    assert len(set(server.ports)) == 2
    server.more.set()
    assert (await soon(first.read_all())).body == b"{}"


@pytest.mark.parametrize("status", [400, 404, 500, 503])
async def test_a_connection_is_not_kept_after_an_error_response(server: Server, ask: Ask, status: int) -> None:
    server.answers = [OK, b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status, OK]
    for _ in range(3):
        await (await ask()).read_all()
    assert server.ports[0] == server.ports[1] != server.ports[2]


@pytest.mark.parametrize(
    "answer",
    [
        OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        OK.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["close", "1.0"],
)
async def test_a_connection_that_the_server_will_close_is_not_kept(server: Server, ask: Ask, answer: bytes) -> None:
    server.answers = [answer, OK]
    assert (await (await ask()).read_all()).body == b"{}"
    await (await ask()).read_all()
    assert len(set(server.ports)) == 2


async def test_a_connection_that_was_idle_for_too_long_is_not_used(server: Server, ask: Ask, monkeypatch) -> None:
    loop = asyncio.get_running_loop()
    server.answers = [OK] * 3
    await (await ask()).read_all()
    ended = loop.time()
    monkeypatch.setattr(loop, "time", lambda: ended + client.KEEP_IDLE - 0.5)
    await (await ask()).read_all()
    monkeypatch.setattr(loop, "time", lambda: ended + 2 * client.KEEP_IDLE)
    await (await ask()).read_all()
    first, second, third = server.ports
    assert first == second != third


async def test_idle_connections_are_closed_without_a_further_request(server: Server, ask: Ask, monkeypatch) -> None:
    monkeypatch.setattr(client, "KEEP_IDLE", 0.05)
    server.answers = [OK]
    await (await ask()).read_all()
    await soon(server.gone.wait())


async def test_the_most_recently_used_connection_is_used_first(server: Server, ask: Ask) -> None:
    server.answers = [(OK[:-2], b"{}"), OK, OK]
    first = await ask()
    await (await ask()).read_all()
    server.more.set()
    await soon(first.read_all())
    await (await ask()).read_all()
    earlier, later, third = server.ports
    assert third == earlier != later


@pytest.mark.parametrize("stray", [b"x", b"\0", OK], ids=["byte", "nul", "answer"])
async def test_data_without_a_request_closes_the_connection(server: Server, ask: Ask, stray: bytes) -> None:
    server.answers = [OK, OK]
    await (await ask()).read_all()
    server.writer.write(stray)
    await soon(server.gone.wait())
    assert (await (await ask()).read_all()).body == b"{}"
    assert len(set(server.ports)) == 2


@pytest.mark.parametrize("stray", [b"x", b"HTTP/1.1 5", OK.replace(b"200", b"500")], ids=["byte", "part", "answer"])
@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
async def test_data_right_behind_a_response_is_no_part_of_it(server: Server, ask: Ask, stray, close) -> None:
    answer = OK.replace(b"Content-Type", close + b"Content-Type")
    server.answers = [answer + stray, OK]
    whole = await (await ask()).read_all()
    assert (whole.status, whole.body) == (200, b"{}")
    assert (await (await ask()).read_all()).body == b"{}"
    assert len(set(server.ports)) == 2, "the connection cannot be trusted"


async def test_a_connection_closed_by_the_server_is_not_used(server: Server, ask: Ask, upstream: Upstream) -> None:
    server.answers = [OK, OK]
    await (await ask()).read_all()
    server.writer.close()
    await condition_met(lambda: not upstream._open)
    await (await ask()).read_all()
    assert len(set(server.ports)) == 2


# -- failures


def check(error: EngineError | EngineDeadline, kind: type, server: Server, **facts: bool) -> None:
    assert type(error) is kind
    assert server.address not in error.message and "decode instance" in error.message
    for name, value in facts.items():
        assert getattr(error, name) is value, name


async def test_a_refused_connection_is_unreachable(server: Server, ask: Ask) -> None:
    with ExitStack() as hold, pytest.raises(EngineError) as caught:
        await ask(address=f"127.0.0.1:{hold_port(hold)}")
    check(caught.value, EngineUnreachable, server, refused=True)


async def test_a_connection_that_is_not_accepted_is_unreachable_after_the_timeout(server: Server, ask: Ask) -> None:
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with pytest.raises(EngineError) as caught:
            await ask(address=f"127.0.0.1:{full.getsockname()[1]}")
    check(caught.value, EngineUnreachable, server, refused=False)


@pytest.mark.parametrize("reused", [False, True])
async def test_a_connection_that_ends_before_the_response(server: Server, ask: Ask, reused: bool) -> None:
    server.answers = [OK, CLOSE]
    await (await ask(fresh=not reused)).read_all()
    with pytest.raises(EngineError) as caught:
        await ask()
    check(caught.value, EngineDisconnected, server, reused=reused, unsent=False)


async def test_a_connection_that_ends_as_it_is_established(
    server: Server, ask: Ask, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from an engine that is killed with connections in its backlog."""
    loop = asyncio.get_running_loop()
    original = loop.create_connection

    async def connect(*args: object) -> object:
        found = await original(*args)
        await condition_met(lambda: hasattr(server, "writer"))
        server.writer.transport.abort()
        await condition_met(lambda: not upstream._open)
        return found

    monkeypatch.setattr(loop, "create_connection", connect)
    with pytest.raises(EngineError) as caught:
        await ask()
    check(caught.value, EngineDisconnected, server, reused=False, unsent=True)


@pytest.mark.parametrize("size", [10, 30_000_000])
async def test_unsent_means_not_sent_completely(ask: Ask, size: int) -> None:
    """A server that reads the beginning only, and resets."""

    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    listening = await asyncio.start_server(reset, "127.0.0.1", 0, limit=1024)
    try:
        with pytest.raises(EngineDisconnected) as caught:
            address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            await ask(address=address, method="POST", body=b"x" * size)
        assert caught.value.unsent is (size > 10)
    finally:
        listening.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: 1\nY: 2\r\n\r\n"[:-2],
    ],
    ids=["ssh", "two lengths", "upgrade", "no end"],
)
async def test_a_response_that_is_not_http(server: Server, ask: Ask, answer: bytes) -> None:
    server.answers = [(answer, CLOSE)]
    server.more.set()
    with pytest.raises(EngineError) as caught:
        await ask()
    check(caught.value, EngineDisconnected, server, unsent=False)


async def test_an_invalid_chunk_fails_the_body(server: Server, ask: Ask) -> None:
    server.answers = [(CHUNKED + b"1\r\n{\r\n", b"no size\r\n")]
    answer = await ask(until=ReadUntil.BODY_STARTED)
    server.more.set()
    with pytest.raises(EngineDisconnected):
        await soon(answer.read_all())
    await soon(server.gone.wait())


@pytest.mark.parametrize(
    "piece", [b"X: %b\r\n" % (b"x" * 9000), b"HTTP/1.1 103 Early\r\n\r\n" * 400], ids=["head", "1xx"]
)
async def test_a_head_that_never_ends_is_bounded(server: Server, ask: Ask, piece: bytes) -> None:
    server.answers = [b"HTTP/1.1 200 OK\r\n" * (piece[:1] == b"X") + piece * 60]
    with pytest.raises(EngineDisconnected):
        await ask()
    await soon(server.gone.wait())


# -- the idle timeout


async def test_the_idle_timeout_before_the_response(server: Server, ask: Ask) -> None:
    server.answers = [b""]
    with pytest.raises(EngineDeadline) as caught:
        await ask(idle_timeout=0.05)
    check(caught.value, EngineDeadline, server)
    await soon(server.gone.wait())


async def test_the_idle_timeout_within_the_body(server: Server, ask: Ask) -> None:
    server.answers = [CUT]
    answer = await ask(idle_timeout=0.05)
    with pytest.raises(EngineDeadline) as caught:
        await soon(answer.read_all())
    check(caught.value, EngineDeadline, server)
    await soon(server.gone.wait())


async def test_each_byte_restarts_the_idle_timeout(server: Server, ask: Ask) -> None:
    server.answers = [(CUT, *[b"x"] * 9)]
    loop = asyncio.get_running_loop()
    begun = loop.time()
    answer = await ask(idle_timeout=0.2)
    reading = asyncio.ensure_future(answer.read_all())
    for number in range(9):
        loop.call_at(begun + 0.05 * (number + 1), server.more.set)
    assert (await soon(reading)).body == b"{" + b"x" * 9
    assert loop.time() - begun > 0.4, "or the test shows nothing"


async def test_each_request_on_a_connection_has_its_own_idle_timeout(server: Server, ask: Ask) -> None:
    server.answers = [OK, (b"", OK), b""]
    await (await ask(idle_timeout=0.05)).read_all()
    asking = asyncio.ensure_future(ask(idle_timeout=5.0))
    asyncio.get_running_loop().call_later(0.15, server.more.set)
    await (await soon(asking)).read_all()
    with pytest.raises(EngineDeadline):
        await asyncio.wait_for(ask(idle_timeout=0.05), 2.0)
    assert len(set(server.ports)) == 1


async def test_the_idle_timeout_is_suspended_while_reading_is_paused(server: Server, ask: Ask) -> None:
    server.answers = [CUT]
    answer = await ask(idle_timeout=0.1, until=ReadUntil.BODY_STARTED)
    sink = Sink()
    answer.pipe_to(sink)
    answer.pause()
    await asyncio.sleep(0.3)
    assert not sink.over.done()
    loop = asyncio.get_running_loop()
    resumed = loop.time()
    answer.resume()
    assert await soon(sink.over) == "EngineDeadline"
    assert loop.time() - resumed > 0.08, "it has its whole time again"


# -- piping


async def test_a_body_is_piped_as_it_arrives(server: Server, ask: Ask) -> None:
    server.answers = [(CHUNKED + b"2\r\nab\r\n", b"1\r\nc\r\n", b"0\r\n\r\n"), OK]
    answer, sink = await ask(until=ReadUntil.BODY_STARTED), Sink()
    answer.pipe_to(sink)
    assert sink.body == b"ab"
    sink.came.clear()
    server.more.set()
    await soon(sink.came.wait())
    assert sink.body == b"abc"
    server.more.set()
    assert await soon(sink.over) == "end"
    answer.close()
    await (await ask()).read_all()
    assert len(set(server.ports)) == 1, "what was read whole is kept"


async def test_chunks_that_arrive_together_stay_together(server: Server, ask: Ask) -> None:
    server.answers = [(CHUNKED, b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n")]
    answer, fed = await ask(), []
    sink = Sink()
    sink.feed = fed.append  # type: ignore[method-assign]
    answer.pipe_to(sink)
    server.more.set()
    await soon(sink.over)
    assert fed == [b"ab"]


@pytest.mark.parametrize("known", [False, True])
async def test_a_body_that_ends_early(server: Server, ask: Ask, known: bool) -> None:
    server.answers = [(CUT, CLOSE)]
    answer, sink = await ask(until=ReadUntil.BODY_STARTED), Sink()
    if known:
        server.more.set()
        await soon(server_closed(answer))
        answer.pipe_to(sink)
    else:
        answer.pipe_to(sink)
        server.more.set()
    assert await soon(sink.over) == "EngineDisconnected"
    assert sink.body == b"{"


async def server_closed(answer: Response) -> None:
    with pytest.raises(EngineDisconnected):
        await answer.wait_until(ReadUntil.COMPLETE)


@pytest.mark.parametrize("end", [b"0\r\n\r\n", CLOSE], ids=["end", "break"])
async def test_the_read_ahead_of_an_unread_body_is_bounded(server: Server, ask: Ask, end: bytes | None) -> None:
    size = 20_000_000
    server.answers = [(CHUNKED, b"%x\r\n" % size + b"x" * size + b"\r\n", end)]
    answer = await ask()
    server.more.set()
    await condition_met(lambda: answer._paused)
    assert answer._buffered < 2_000_000
    server.more.set()
    sink = Sink()
    answer.pipe_to(sink)
    assert await soon(sink.over) == ("end" if end else "EngineDisconnected")
    assert len(sink.body) == size


async def test_a_paused_body_stays_in_the_socket_buffers(server: Server, ask: Ask) -> None:
    size = 20_000_000
    server.answers = [(CHUNKED, b"%x\r\n" % size + b"x" * size + b"\r\n0\r\n\r\n")]
    answer, sink = await ask(), Sink()
    answer.pipe_to(sink)
    server.more.set()
    await soon(sink.came.wait())
    answer.pause()
    await asyncio.sleep(0)
    taken = len(sink.body)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(sink.body) == taken < size
    answer.resume()
    assert await soon(sink.over) == "end"
    assert len(sink.body) == size


# -- giving up


@pytest.mark.parametrize("answer", [b"", CUT])
async def test_a_cancelled_request_closes_the_connection(server: Server, ask: Ask, answer: bytes) -> None:
    server.answers = [answer]
    waiting = asyncio.ensure_future(ask(until=ReadUntil.COMPLETE))
    await condition_met(lambda: bool(server.asked))
    waiting.cancel()
    await soon(server.gone.wait())


async def test_a_request_cancelled_as_its_connection_is_established_is_not_sent(
    server: Server, ask: Ask, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    original = loop.create_connection

    async def connect(*args: object) -> object:
        found = await original(*args)
        asking.cancel()
        return found

    monkeypatch.setattr(loop, "create_connection", connect)
    instance = server.instance()
    asking = asyncio.create_task(upstream.request("GET", instance, "/x", idle_timeout=5.0, leg="decode"))
    with pytest.raises(asyncio.CancelledError):
        await soon(asking)
    await condition_met(lambda: not upstream._open)
    assert not server.asked


async def test_a_cancelled_reader_closes_the_connection(server: Server, ask: Ask) -> None:
    server.answers = [CUT]
    waiting = asyncio.create_task((await ask()).read_all())
    await asyncio.sleep(0)
    waiting.cancel()
    await soon(server.gone.wait())
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_closing_while_piping_fails_the_sink(server: Server, ask: Ask) -> None:
    server.answers = [CUT]
    answer, sink = await ask(), Sink()
    answer.pipe_to(sink)
    answer.close()
    assert sink.over.result() == "EngineDisconnected"
    await soon(server.gone.wait())


async def test_close_closes_all_connections(server: Server) -> None:
    upstream = Upstream(1.0, WriteBatch())
    server.answers = [OK, CUT, CUT]
    options = {"idle_timeout": 5.0, "leg": "decode"}
    await (await upstream.request("GET", server.instance(), "/", **options)).read_all()
    reading = asyncio.create_task((await upstream.request("GET", server.instance(), "/", **options)).read_all())
    sink = Sink()
    (await upstream.request("GET", server.instance(), "/", **options)).pipe_to(sink)
    await soon(upstream.close())
    assert sink.over.result() == "EngineDisconnected"
    with pytest.raises(EngineDisconnected):
        await reading
    assert not upstream._open
    await soon(server.gone.wait())
