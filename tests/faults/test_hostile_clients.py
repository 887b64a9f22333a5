"""Clients that mean harm, over bare sockets: one JSON error and a closed connection, or a right answer; never two
requests read as one nor one as two, and never a connection that is kept for nothing."""

import asyncio
import contextlib
import json
import random
import re
from collections import Counter

import pytest
from multidict import CIMultiDict

from tests.conftest import Wire, soon
from tests.faults.conftest import LARGE, dial_slowly
from tests.simulated import REQUESTS, RIGHT, check_error, events, text_of, text_of_events

PATH = "/v1/completions"
BODY = json.dumps(REQUESTS[PATH]).encode()
TWO_CHUNKS = b"%x\r\n%b\r\n1\r\n \r\n0\r\n\r\n" % (len(BODY), BODY)
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: proxy\r\n\r\n"


def post(*headers: str, body: bytes = b"", line: str = f"POST {PATH} HTTP/1.1", host: str | None = "proxy") -> bytes:
    lines = [line, *([] if host is None else [f"Host: {host}"]), "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def get(line: str) -> bytes:
    return post(line=line)


LENGTH = f"Content-Length: {len(BODY)}"
CHUNKED = "Transfer-Encoding: chunked"
WHOLE = post(LENGTH, body=BODY)


def chunks(body: bytes) -> bytes:
    return post(CHUNKED, body=body)


REFUSED = {
    "the length of a body": {
        "length and encoding": post(LENGTH, CHUNKED, body=TWO_CHUNKS),
        "encoding and length": post(CHUNKED, "Content-Length: 3", body=TWO_CHUNKS),
        "two lengths": post("Content-Length: 0", LENGTH, body=BODY),
        "the same length twice": post(LENGTH, LENGTH, body=BODY),
        "a list of lengths": post("Content-Length: 3, 3", body=b"{} "),
        "plus": post("Content-Length: +3", body=b"{} "),
        "minus": post("Content-Length: -3", body=b"{} "),
        "hexadecimal": post("Content-Length: 0x3", body=b"{} "),
        "a space inside": post("Content-Length: 3 3", body=b"{} "),
        "empty": post("Content-Length:", body=b"{} "),
        "above 64 bits": post("Content-Length: 18446744073709551619", body=b"{} "),
    },
    "the encoding of a body": {
        value or "empty": post(f"Transfer-Encoding: {value}", body=TWO_CHUNKS)
        for value in (
            *("", "identity", "xchunked", "chunked, identity", "chunked, chunked", "gzip, chunked", ",chunked"),
            *("chunked;q=1", '"chunked"', "\x0bchunked", "chunked\r\nTransfer-Encoding: chunked"),
            *("identity\r\nTransfer-Encoding: chunked", "\r\n chunked"),
        )
    }
    | {"HTTP/1.0": post(CHUNKED, body=TWO_CHUNKS, line=f"POST {PATH} HTTP/1.0")},
    "a chunk": {
        repr(body): chunks(body + b"\r\n0\r\n\r\n")
        for body in (
            *(
                b"0x2\r\n{}",
                b"+2\r\n{}",
                b"-2\r\n{}",
                b" 2\r\n{}",
                b"2 \r\n{}",
                b"2\n{}",
                b"2\r{}",
                b"\r\n{}",
                b"2,2\r\n{}",
            ),
            *(
                b"10000000000000002\r\n{}",
                b"2;\r\n{}",
                b"2;a\nb\r\n{}",
                b'2;a="\n"\r\n{}',
                b"2;a\rb\r\n{}",
                b"2\r\n{}x",
            ),
            *(b"2\r\n{}\n0\r\n\r\n", b"2\r\n{}0", b"2\r\n{}\r\n0\n", b"2\r\n{}\r\n0\r\n\n", b"g\r\n{}"),
            *(b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n", b"2\r\n{}\r\n0\r\nHost: y\r\n", b"2\r\n{}\r\n0\r\nX: 1\n"),
        )
    },
    "a header": {
        "a folded line": post("X-A: 1\r\n b"),
        "a space before the colon": post(f"Content-Length : {len(BODY)}", body=BODY),
        "a space before the first": b"GET /livez HTTP/1.1\r\n Host: proxy\r\n\r\n",
        "only LF": WHOLE.replace(b"\r\n", b"\n"),
        "one LF": post("X-A: 1\nX-B: 2"),
        "a bare CR": post("X-A: 1\rX-B: 2"),
        "NUL in a value": post("X-A: 1\0"),
        "NUL in a name": post("X\0A: 1"),
        "DEL": post("X-A: 1\x7f"),
        "Latin-1 in a name": post("X\xe4: 1"),
        "no name": post(": 1"),
        "no colon": post("abc"),
        "two hosts": post("Host: other"),
        "the same host twice": post("Host: proxy"),
        "no host": post(host=None),
        "a host with a path": post(host="proxy/x"),
        "two hosts in one": post(host="proxy other"),
        "a host with an empty label": post(host="proxy..example"),
        "a host that starts with a dot": post(host=".example"),
        "a host with a long label": post(host="a" * 64),
        "a host with a long first label": post(host="a" * 64 + ".example:80"),
    },
    "a request line": {
        line: get(line)
        for line in (
            *("GET http://proxy/livez HTTP/1.1", "GET http://other HTTP/1.1", "GET * HTTP/1.1", "GET ?a HTTP/1.1"),
            *("GET /livez#a HTTP/1.1", "GET livez HTTP/1.1", "GET proxy:80 HTTP/1.1", "CONNECT proxy:80 HTTP/1.1"),
            *(
                "CONNECT / HTTP/1.1",
                "get /livez HTTP/1.1",
                "FOO /livez HTTP/1.1",
                "GET /a b HTTP/1.1",
                "GET /\0 HTTP/1.1",
            ),
            *("GET\t/livez HTTP/1.1", "GET /livez HTTP/1.1 ", "GET /livez http/1.1", "GET /livez HTTP/1.1\rX: y"),
            *("GET /livez HTTP/1.2", "GET /livez HTTP/3.0", "PRI * HTTP/2.0", "GET /livez HTTP/11", "\x16\x03\x01"),
            *("GET /livez HTTP/2.0", "GET /livez HTTP/0.9"),
        )
    }
    | {"HTTP/0.9": b"GET /livez\r\n\r\n"},
}
OTHER_STATUS = {"HTTP/0.9": 505, "GET /livez HTTP/2.0": 505, "GET /livez HTTP/0.9": 505}
CODES = {400: "invalid_request", 408: "request_timeout", 431: "headers_too_large", 505: "http_version_not_supported"}


async def answers(wire: Wire) -> list[tuple[int, CIMultiDict[str], bytes]]:
    """All answers until the proxy closes the connection."""
    found = []
    while True:
        try:
            found.append(await wire.answer())
        except asyncio.IncompleteReadError as end:
            if end.partial:
                raise
            return found


async def check_refused(wire: Wire, status: int = 400) -> str:
    """One error, and the end."""
    (answer,) = await answers(wire)
    assert answer[1]["Connection"] == "close"
    return check_error(*answer, status, CODES[status])


def check_right(answer: tuple[int, CIMultiDict[str], bytes]) -> None:
    assert answer[0] == 200 and text_of(json.loads(answer[2])) == RIGHT[PATH], answer


async def trickle(wire: Wire, piece: bytes) -> bytes:
    """Send ``piece`` again and again until the proxy closes the connection; what it said."""

    async def send() -> None:
        while True:
            wire.send(piece)
            await asyncio.sleep(0.005)

    sending = asyncio.create_task(send())
    try:
        return await soon(wire.reader.read())
    finally:
        sending.cancel()


@pytest.mark.parametrize("what", REFUSED)
async def test_what_could_be_read_in_two_ways_is_refused_and_ends_the_connection(machine, dial, what: str) -> None:
    for name, raw in REFUSED[what].items():
        for pieces in ([raw + SMUGGLED], [raw[i : i + 1] for i in range(len(raw))] + [SMUGGLED]):
            wire = await dial(machine.proxy.url)
            for piece in pieces:
                wire.send(piece)
                await asyncio.sleep(0)
            try:
                await check_refused(wire, OTHER_STATUS.get(name, 400))
            except Exception as error:
                raise AssertionError(f"{name}, in {len(pieces)} pieces") from error


@pytest.mark.parametrize(
    "raw",
    [
        post(f"content-length: 000{len(BODY)}  ", body=BODY),
        chunks(TWO_CHUNKS),
        chunks(b"0000" + TWO_CHUNKS.replace(b"\r\n", b';a="b;c"\r\n', 1)),
        chunks(TWO_CHUNKS[:-2] + b"X-Trailer: 1\r\nX-More: 2\r\n\r\n"),
        post("transfer-encoding: Chunked", body=TWO_CHUNKS),
        post("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: x", LENGTH, body=BODY),
        post("Connection: Upgrade", "Upgrade: websocket", CHUNKED, body=TWO_CHUNKS),
        b"\r\n" + WHOLE,
        post(LENGTH, "X-A: \xff", body=BODY),
        post(CHUNKED + " ", "X-A:\tb\t", body=TWO_CHUNKS, host="proxy "),
    ],
    ids=[
        "length",
        "chunks",
        "extension",
        "trailers",
        "case",
        "h2c",
        "websocket",
        "empty line",
        "latin-1",
        "white space",
    ],
)
async def test_odd_but_clear_requests_are_served_and_so_is_the_next(machine, pair, dial, raw: bytes) -> None:
    for size in (len(raw), 7):
        wire = await dial(machine.proxy.url)
        for start in range(0, len(raw), size):
            wire.send(raw[start : start + size])
            await asyncio.sleep(0)
        wire.send(WHOLE)
        check_right(await wire.answer())
        check_right(await wire.answer())
    assert len(pair[1].received(PATH)) == 4


async def test_white_space_around_a_value_is_no_part_of_it(machine, pair, dial) -> None:
    wire = await dial(machine.proxy.url)
    wire.send(post(LENGTH, "X-Request-Id: \t mine \t", "X-A:  a b  ", body=BODY))
    answer = await wire.answer()
    check_right(answer)
    assert answer[1]["X-Request-Id"] == "mine"
    assert pair[0].received(PATH)[0].headers["X-A"] == "a b"


@pytest.mark.parametrize("host", ["proxy", "elsewhere.example", "a:b:c"])
@pytest.mark.parametrize("path", ["/v1//models", "/v1/models//x", "/v1/responses//x", "/v1//completions"])
async def test_no_path_is_answered_with_a_redirect(machine, dial, path: str, host: str) -> None:
    wire = await dial(machine.proxy.url)
    wire.send(post(line=f"GET {path} HTTP/1.1", host=host))
    status, headers, body = await wire.answer()
    assert status in (404, 501) and "Location" not in headers
    assert json.loads(body)["error"]["code"] in ("not_found", "not_implemented", "model_not_found")


@pytest.mark.parametrize(
    "host",
    ["", "proxy.", "a" * 63 + ".b:80", "[::1]:80", "::1", "[fe80::1%25eth0]", "xn--a", "-", "proxy:", ":80", "_a.b"],
)
async def test_odd_hosts_that_name_something_are_taken(machine, dial, host: str) -> None:
    wire = await dial(machine.proxy.url)
    wire.send(post(line="GET /livez HTTP/1.1", host=host))
    assert (await wire.answer())[0] == 200


@pytest.mark.settings(api_key="sk-right")
async def test_a_trailer_is_no_header(machine, pair, dial) -> None:
    wire = await dial(machine.proxy.url)
    wire.send(chunks(TWO_CHUNKS[:-2] + b"Authorization: Bearer sk-right\r\n\r\n"))
    check_error(*await wire.answer(), 401, "invalid_api_key")


async def test_pipelined_requests_are_answered_in_order(machine, pair, dial) -> None:
    wire = await dial(machine.proxy.url)
    wire.send(WHOLE + SMUGGLED + chunks(TWO_CHUNKS) + get("GET /nowhere HTTP/1.1") + WHOLE)
    check_right(await wire.answer())
    assert json.loads((await wire.answer())[2])["object"] == "list"
    check_right(await wire.answer())
    assert (await wire.answer())[0] == 404
    check_right(await wire.answer())


@pytest.mark.parametrize("bad", [b"nonsense\r\n\r\n", chunks(b"x\r\n")], ids=["head", "body"])
async def test_a_refusal_does_not_disturb_the_stream_before_it(machine, pair, dial, bad: bytes) -> None:
    decode = pair[1]
    decode.faults.hold("schedule", after=3)
    wire = await dial(machine.proxy.url)
    wire.post(PATH, {**REQUESTS[PATH], "stream": True})
    await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
    wire.send(bad + SMUGGLED)
    # It has been read when a later connection was served.
    assert (await machine.get("/livez"))[0] == 200
    decode.faults.release()
    stream, refusal = await answers(wire)
    assert text_of_events(events(stream[2])) == RIGHT[PATH]
    check_error(*refusal, 400, "invalid_request")
    await machine.unharmed(*pair)


async def test_a_pipeline_without_end_is_refused_after_what_was_taken(machine, dial) -> None:
    wire = await dial(machine.proxy.url)
    wire.send(get("GET /livez HTTP/1.1") * 1000)
    *served, last = await answers(wire)
    assert {status for status, *_ in served} == {200} and 128 <= len(served) < 1000
    assert "wait on this connection" in check_error(*last, 400, "invalid_request")


async def test_a_pipelining_client_that_leaves_ends_the_request_that_runs(machine, pair, dial) -> None:
    decode = pair[1]
    decode.faults.hold("schedule", after=3)
    wire = await dial(machine.proxy.url)
    wire.post(PATH, {**REQUESTS[PATH], "stream": True})
    await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
    assert (await wire.head())[0] == 200
    wire.send(WHOLE)
    assert (await machine.get("/livez"))[0] == 200
    wire.leave()
    await soon(machine.proxy.until_idle())
    decode.faults.release()
    await machine.unharmed(*pair)


async def check_closed(wire: Wire, piece: bytes) -> None:
    """The connection ends without a word; what crosses the closing on the wire may make that a reset."""
    with contextlib.suppress(ConnectionResetError):
        assert await trickle(wire, piece) == b""


@pytest.mark.settings(header_timeout=0.1)
async def test_a_client_that_sends_nothing_is_closed(machine, dial) -> None:
    assert await answers(await dial(machine.proxy.url)) == []


@pytest.mark.settings(header_timeout=0.02)
async def test_a_request_that_arrived_in_time_is_served_after_a_stall_of_the_event_loop(
    machine, pair, dial, monkeypatch
) -> None:
    """The timer fires before the first read of the connection."""
    protocol = machine.proxy.server.config.http_protocol_class
    original = protocol.connection_made

    def stall(self, transport) -> None:
        original(self, transport)
        asyncio.get_running_loop().advance(0.03)

    monkeypatch.setattr(protocol, "connection_made", stall)
    wire = await dial(machine.proxy.url)
    wire.send(WHOLE)
    check_right(await wire.answer())


@pytest.mark.settings(header_timeout=0.1)
@pytest.mark.parametrize("piece", [b"", b"X-A: b\r\n", b"x"])
@pytest.mark.parametrize("earlier", [0, 1])
async def test_headers_that_never_end_are_408(machine, dial, piece: bytes, earlier: int) -> None:
    wire = await dial(machine.proxy.url)
    for _ in range(earlier):
        wire.send(get("GET /livez HTTP/1.1"))
        assert (await wire.answer())[0] == 200
    wire.send(b"GET /livez HTTP/1.1\r\nHost: proxy\r\n")
    said = await trickle(wire, piece)
    assert said.startswith(b"HTTP/1.1 408 ") and b"HEADER_TIMEOUT" in said and said.count(b"HTTP/1.1 ") == 1


async def test_a_kept_connection_is_closed_after_its_time_whatever_empty_lines_it_sends(machine, dial) -> None:
    machine.proxy.server.config.timeout_keep_alive = 0.1
    wire = await dial(machine.proxy.url)
    wire.send(get("GET /livez HTTP/1.1"))
    assert (await wire.answer())[0] == 200
    await check_closed(wire, b"\r\n")


@pytest.mark.settings(api_key="sk-right", body_timeout=0.1)
@pytest.mark.parametrize("piece", [b"", b"x"])
async def test_a_body_that_was_answered_early_must_end_too(machine, dial, piece: bytes) -> None:
    wire = await dial(machine.proxy.url)
    wire.start(PATH, "Content-Length: 1000000")
    check_error(*await wire.answer(), 401, "invalid_api_key")
    await check_closed(wire, piece)


@pytest.mark.settings(max_header_bytes=2000)
@pytest.mark.parametrize(
    "head",
    [
        post("X-A: " + "b" * 3000),
        post("X" * 3000 + ": b"),
        post(*["X-A: b"] * 101),
        get("GET /" + "a" * 3000 + " HTTP/1.1"),
        post("X-A: " + "b" * 100_000),
        post("Connection: Upgrade", "Upgrade: h2c", "X-A: " + "b" * 3000),
    ],
    ids=["value", "name", "count", "target", "long", "upgrade"],
)
async def test_headers_beyond_the_limits_are_431(machine, dial, head: bytes) -> None:
    for pieces in ([head + SMUGGLED], [head[i : i + 99] for i in range(0, len(head) - 4, 99)]):
        wire = await dial(machine.proxy.url)
        for piece in pieces:
            wire.send(piece)
            await asyncio.sleep(0)
        await check_refused(wire, 431)


@pytest.mark.settings(max_header_bytes=2000)
async def test_headers_within_the_limits_are_served(machine, dial) -> None:
    wire = await dial(machine.proxy.url)
    long, many = (
        get("GET /livez HTTP/1.1")[:-2] + extra for extra in (b"X: " + b"y" * 1900 + b"\r\n", b"X: y\r\n" * 98)
    )
    for head in (long + b"\r\n", many + b"\r\n", (many + b"\r\n") * 5):
        for size in (len(head), 99):
            for start in range(0, len(head), size):
                wire.send(head[start : start + size])
                await asyncio.sleep(0)
            for _ in range(head.count(b"GET")):
                assert (await wire.answer())[0] == 200


@pytest.mark.parametrize("piece", [b"a" * 65536, b"1;" + b"a" * 999 + b"\r\nx\r\n"], ids=["one", "many"])
async def test_chunk_extensions_without_end_are_refused(machine, dial, piece: bytes) -> None:
    wire = await dial(machine.proxy.url)
    wire.send(chunks(b"1;a" if piece[:1] == b"a" else b""))
    for _ in range(4 * 2**20 // len(piece)):
        wire.send(piece)
        await wire.writer.drain()
    assert "framing" in await check_refused(wire)


async def test_a_body_refused_at_once_is_not_asked_for_any_more(machine, dial, caplog) -> None:
    wire = await dial(machine.proxy.url)
    wire.send(post(CHUNKED, "Expect: 100-continue", body=b"no size\r\n"))
    await check_refused(wire)
    await soon(machine.proxy.until_idle())
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_body_refused_before_100_continue_ends_the_connection(machine, dial) -> None:
    # What the client sends next could be that body, or its next request.
    wire = await dial(machine.proxy.url)
    wire.start(PATH, "Content-Length: 999999999", "Expect: 100-continue")
    status, headers = await wire.head()
    if status == 100:
        status, headers = await wire.head()
    assert status == 413 and headers["Connection"] == "close"


@pytest.mark.settings(send_timeout=0.1)
async def test_a_client_that_reads_nothing_is_cut_off(machine, pair) -> None:
    wire = await dial_slowly(machine.proxy)
    wire.post(PATH, LARGE)
    await soon(pair[1].wait_until(lambda _: bool(pair[1].received(PATH))))
    await soon(machine.proxy.until_idle())
    await machine.unharmed(*pair)
    with contextlib.suppress(ConnectionError):
        assert not (await soon(wire.reader.read())).endswith(b"0\r\n\r\n")
    wire.leave()


async def test_many_idle_connections_stop_nobody(machine, pair, dial) -> None:
    await asyncio.gather(*(dial(machine.proxy.url) for _ in range(300)))
    assert len(machine.proxy.server.server_state.connections) >= 300
    assert text_of((await machine.post(PATH, REQUESTS[PATH]))[2]) == RIGHT[PATH]


async def test_more_connections_than_files_allow_are_503_until_one_closes(machine, dial) -> None:
    machine.proxy.server.config.http_protocol_class.max_connections = 2
    first, second = await dial(machine.proxy.url), await dial(machine.proxy.url)
    (refusal,) = await answers(await dial(machine.proxy.url))
    check_error(*refusal, 503, "service_unavailable")
    assert int(refusal[1]["Retry-After"]) > 0 and re.fullmatch("[0-9a-f]{32}", refusal[1]["X-Request-Id"])
    for wire in (first, second):
        wire.send(get("GET /livez HTTP/1.1"))
        assert (await wire.answer())[0] == 200


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":' * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"model": "sim-model", "prompt": "x", "max_tokens": ' + b"9" * 100_000 + b"}",
        b'{"model": "sim-model", "prompt": "\x00"}',
        b'{"model": "sim-model", "prompt": "\xc0\xaf"}',
        b'{"model": "sim-model", "prompt": "x"} {}',
        b'{"model": "sim-model", "prompt": "x",}',
        b"\xef\xbb\xbf{",
        b"\x00",
    ],
    ids=["unclosed", "objects", "digits", "NUL", "overlong", "two", "comma", "BOM", "zero"],
)
async def test_malformed_json_is_400(machine, pair, raw: bytes) -> None:
    check_error(*await machine.send(PATH, raw), 400, "invalid_request")


def mutated(rng: random.Random, raw: bytes) -> bytes:
    """``raw`` with a few faults of the kinds that parsers stumble over."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case 2:
                data[at:at] = rng.choice(
                    [b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"\r\n ", b"\xff", b"0", b"{", b"-"]
                )
            case 3:
                data[at:at] = rng.choice([CHUNKED, LENGTH, "Content-Length: 1", "Host: x"]).encode() + b"\r\n"
            case 4:
                data[at:at] = data[at : at + rng.randint(1, 60)]
            case 5:
                del data[at:]
    return bytes(data)


@pytest.mark.settings(header_timeout=0.2, body_timeout=0.2)
async def test_300_mutated_requests_do_no_harm(machine, pair, dial, record_property, caplog) -> None:
    machine.proxy.server.config.timeout_keep_alive = 0.2
    loop = asyncio.get_running_loop()
    rng = random.Random(20003)
    seeds = [
        WHOLE,
        chunks(TWO_CHUNKS),
        WHOLE + WHOLE,
        SMUGGLED,
        post("Connection: Upgrade", "Upgrade: x", LENGTH, body=BODY),
    ]
    counts: Counter[str] = Counter()

    async def one(raw: bytes) -> None:
        begun = loop.time()
        wire = await dial(machine.proxy.url)
        wire.send(raw)
        sent_late = loop.time() - begun >= 0.2
        try:
            said = await soon(wire.reader.read())
        except ConnectionResetError:
            # HEADER_TIMEOUT closed the connection while it was idle, and the request crossed the close.
            assert sent_late
            said = b""
        counts["connections"] += 1
        counts["answers of 500"] += said.count(b"HTTP/1.1 500")
        for line in said.split(b"HTTP/1.1 ")[1:]:
            counts[line[:3].decode()] += 1
        counts["no answer"] += not said

    for _ in range(10):
        await asyncio.gather(*(one(mutated(rng, rng.choice(seeds))) for _ in range(30)))
    record_property("answers", dict(counts))
    print(f"answers to 300 mutated requests: {dict(counts)}")
    assert counts["connections"] == 300 and counts["200"] and counts["400"] and not counts["answers of 500"]
    assert not [record for record in caplog.records if record.exc_info]
    assert text_of((await machine.post(PATH, REQUESTS[PATH]))[2]) == RIGHT[PATH]
    await machine.unharmed(*pair)
