"""A generation request gets the same answer whether it is taken off the connection directly or goes through Quart."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from disagg_proxy.server.fast_path import FastPathRequest
from disagg_sim import SimEngine
from tests.conftest import Wire, soon
from tests.simulated import REQUESTS, RIGHT, Machine, check_error, events, text_of, text_of_events

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
HEALTH = b"GET /health HTTP/1.1\r\nHost: proxy\r\n\r\n"
JSON = b"Content-Type: application/json\r\n"

Answer = tuple[int, list[tuple[str, str]], bytes]
Dial = Callable[[str], Awaitable[Wire]]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the requests that were taken directly."""
    paths: list[str] = []
    original = FastPathRequest.__init__

    def init(self: FastPathRequest, client: Any, services: Any, asked: Any, *rest: Any) -> None:
        paths.append(asked.route.path)
        original(self, client, services, asked, *rest)

    monkeypatch.setattr(FastPathRequest, "__init__", init)
    return paths


async def told(wire: Wire) -> Answer:
    """An answer without what no two answers share."""
    status, headers, raw = await wire.answer()
    raw = re.sub(rb'"(cmpl|chatcmpl|msg)[-_][0-9a-f]+', rb'"\1-ID', raw)
    raw = re.sub(rb'"created":\s*\d+', b'"created":0', raw)
    got = ((name, re.sub("^[0-9a-f]{32}$", "an id", value)) for name, value in headers.items() if name != "date")
    return status, sorted(got), raw


async def directly(wire: Wire, path: str, body: Any, *headers: str) -> Answer:
    wire.post(path, body, *headers)
    return await told(wire)


async def chunked(wire: Wire, path: str, body: Any, *headers: str) -> Answer:
    wire.chunked = True
    answer = await directly(wire, path, body, *headers)
    wire.chunked = False
    return answer


async def behind_another(wire: Wire, path: str, body: Any, *headers: str) -> Answer:
    wire.send(HEALTH)
    wire.post(path, body, *headers)
    assert (await wire.answer())[0] in (200, 503)
    return await told(wire)


async def expecting(wire: Wire, path: str, body: Any, *headers: str) -> Answer:
    wire.post(path, body, "Expect: 100-continue", *headers)
    assert (await wire.head())[0] == 100
    status, got, raw = await told(wire)
    got.remove(("connection", "close"))
    return status, got, raw


THROUGH_QUART = [chunked, behind_another, expecting]


async def same(
    machine: Machine, dial: Dial, taken: list[str], path: str, body: Any, *headers: str, before: Any = None
) -> Answer:
    """The answer, which is the same on every way."""
    answers = []
    for way in (directly, *THROUGH_QUART):
        if before is not None:
            before()
        wire = await dial(machine.proxy.url)
        answers.append(await way(wire, path, body, "X-Request-Id: mine", *headers))
        assert taken == [path], way.__name__
        wire.leave()
        await soon(machine.proxy.until_idle())
    for way, answer in zip(THROUGH_QUART, answers[1:], strict=True):
        assert answer == answers[0], way.__name__
    assert all(name == name.lower() for name, _ in answers[0][1])
    return answers[0]


@pytest.mark.parametrize("path", REQUESTS)
async def test_whole_answers(machine, pair, dial, taken, path: str) -> None:
    status, headers, raw = await same(machine, dial, taken, path, REQUESTS[path])
    assert status == 200 and text_of(json.loads(raw)) == RIGHT[path]
    assert dict(headers) == {
        "content-length": str(int(dict(headers)["content-length"])),
        "content-type": "application/json",
        "x-request-id": "mine",
        **({"request-id": "mine"} if path == "/v1/messages" else {}),
    }


@pytest.mark.parametrize("path", REQUESTS)
async def test_streams(machine, pair, dial, taken, path: str) -> None:
    status, headers, raw = await same(machine, dial, taken, path, {**REQUESTS[path], "stream": True})
    assert status == 200 and text_of_events(events(raw)) == RIGHT[path]
    assert dict(headers)["transfer-encoding"] == "chunked" and "content-length" not in dict(headers)
    assert dict(headers)["content-type"].startswith("text/event-stream")
    assert dict(headers)["x-accel-buffering"] == "no", "nginx must not buffer it"


@pytest.mark.settings(api_key="key")
@pytest.mark.parametrize("query", ["?beta=true", "?", "?a=b&c=%20d", "?/v1/messages"])
@pytest.mark.parametrize("path", REQUESTS)
async def test_a_query_string_changes_nothing(machine, pair, dial, taken, path: str, query: str) -> None:
    """Anthropic's clients add ``?beta=true`` to every request."""
    plain, other = await dial(machine.proxy.url), await dial(machine.proxy.url)
    key = "Authorization: Bearer key"
    for stream in (False, True):
        body = {**REQUESTS[path], "stream": stream}
        expected = await directly(plain, path, body, key, "X-Request-Id: mine")
        for _ in range(2):  # parsed, then known
            assert await directly(other, path + query, body, key, "X-Request-Id: mine") == expected
        assert await chunked(other, path + query, body, key, "X-Request-Id: mine") == expected
    assert taken == [path] * 6
    assert len(machine.proxy.server.config.http_protocol_class.heads) == 2, "both heads are parsed once"
    assert all(len(engine.received(path)) == 8 for engine in pair)
    assert (await directly(other, path + query, REQUESTS[path]))[0] == 401 and len(taken) == 6


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_request"),
        (b"[]", 400, "invalid_request"),
        (b"\xff", 400, "invalid_request"),
        ({**ASK, "model": "other"}, 404, "model_not_found"),
        ({**ASK, "model": 7}, 400, "invalid_request"),
    ],
)
async def test_what_the_proxy_refuses(machine, pair, dial, taken, body: Any, status: int, code: str) -> None:
    got, headers, raw = await same(machine, dial, taken, PATH, body)
    check_error(got, {"Content-Type": dict(headers)["content-type"]}, raw, status, code)
    assert ("x-request-id", "mine") in headers


@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize(("status", "expected"), [(422, 422), (429, 503), (500, 502)])
async def test_what_an_engine_refuses(machine, pair, dial, taken, leg: str, status: int, expected: int) -> None:
    engine: SimEngine = pair[leg == "decode"]
    said = {"Retry-After": "7", "X-Note": "a  b", "Set-Cookie": "c=d; Path=/"}

    def refuse() -> None:
        engine.faults.fail_next(status, b'{"error": {"message": "no"}}', said, path=PATH)

    got, headers, raw = await same(machine, dial, taken, PATH, ASK, before=refuse)
    assert got == expected and (expected == 503 or b"no" in raw)
    assert dict(headers)["retry-after"] == "7"
    assert (dict(headers).get("x-note") == "a  b") is (expected < 500)


async def test_nobody_can_serve_it(machine, dial, taken) -> None:
    status, headers, raw = await same(machine, dial, taken, PATH, ASK)
    assert status == 503 and int(dict(headers)["retry-after"]) >= 1 and json.loads(raw)["error"]["type"]


@pytest.mark.settings(decode_max_in_flight=1, max_queue=0)
async def test_the_queue_is_full(machine, pair, dial, monkeypatch) -> None:
    answers = []
    with pair[1].faults.held():
        first = await dial(machine.proxy.url)
        first.post(PATH, ASK)
        await soon(pair[1].wait_until(lambda state: state["held_at"]))
        for way in (directly, *THROUGH_QUART):
            answers.append(await way(await dial(machine.proxy.url), PATH, ASK))
    assert (await first.answer())[0] == 200
    assert answers[0][0] == 429 and int(dict(answers[0][1])["retry-after"]) >= 1
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.settings(cors_origins=("https://a.example",))
async def test_a_browser_gets_its_headers_and_others_none(machine, pair, dial, taken) -> None:
    plain = await directly(await dial(machine.proxy.url), PATH, ASK)
    assert taken == [PATH]
    status, headers, raw = await directly(await dial(machine.proxy.url), PATH, ASK, "Origin: https://a.example")
    assert taken == [PATH] and ("access-control-allow-origin", "https://a.example") in headers
    assert (status, raw) == (200, plain[2])
    assert {name for name, _ in plain[1]} <= {name for name, _ in headers}
    assert not any(name.startswith("access-control") for name, _ in plain[1])


# -- before the body


@pytest.mark.settings(api_key="key")
@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("given", ["", "Bearer other", "Bearer ", "Basic key"])
async def test_without_the_key_no_body_is_read(machine, pair, dial, taken, framing: str, given: str) -> None:
    wire = await dial(machine.proxy.url)
    wire.start(PATH, framing, *([f"Authorization: {given}"] if given else []))
    status, headers, raw = await wire.answer()
    check_error(status, headers, raw, 401, json.loads(raw)["error"]["code"])
    assert not taken


@pytest.mark.settings(api_key="key")
async def test_with_the_key_both_ways_are_open(machine, pair, dial, taken) -> None:
    status, _, raw = await same(machine, dial, taken, PATH, ASK, "Authorization: Bearer key")
    assert status == 200 and text_of(json.loads(raw)) == RIGHT[PATH]


@pytest.mark.settings(max_body_bytes=1000)
async def test_a_body_that_is_too_large(machine, pair, dial, taken) -> None:
    answers = []
    for way in (directly, chunked):
        answers.append(await way(await dial(machine.proxy.url), PATH, b" " * 1001))
    assert answers[0][0] == 413 and b"MAX_BODY_BYTES" in answers[0][2]
    assert answers[0][2] == answers[1][2] and not taken
    fits = json.dumps(ASK).encode().ljust(1000)
    assert (await directly(await dial(machine.proxy.url), PATH, fits))[0] == 200 and taken


async def test_a_compressed_body(machine, pair, dial, taken) -> None:
    answers = []
    for way in (directly, chunked):
        answers.append(await way(await dial(machine.proxy.url), PATH, b"x", "Content-Encoding: gzip"))
    assert answers[0] == answers[1] and answers[0][0] == 415 and not taken
    assert (await same(machine, dial, taken, PATH, ASK, "Content-Encoding: Identity"))[0] == 200


@pytest.mark.settings(body_timeout=0.15)
@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
async def test_a_body_that_does_not_come(machine, pair, dial, framing: str) -> None:
    wire = await dial(machine.proxy.url)
    wire.start(PATH, framing)
    wire.send(b"1\r\n{")
    status, _headers, raw = await wire.answer()
    assert status == 408 and b"BODY_TIMEOUT" in raw
    await soon(machine.proxy.until_idle())


@pytest.mark.settings(body_timeout=0.2)
async def test_the_time_for_a_body_is_not_that_for_its_answer(machine, pair, dial, taken) -> None:
    wire = await dial(machine.proxy.url)
    with pair[1].faults.held():
        wire.post(PATH, ASK)
        await asyncio.sleep(0.5)
    assert (await wire.answer())[0] == 200 and taken


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_direct_body_may_come_in_pieces(machine, pair, dial, taken, size: int) -> None:
    wire = await dial(machine.proxy.url)
    raw = json.dumps(ASK).encode()
    wire.start(PATH, f"Content-Length: {len(raw)}")
    await soon(until(lambda: taken))
    for at in range(0, len(raw), size):
        wire.send(raw[at : at + size])
        await asyncio.sleep(0)
    status, _, body = await wire.answer()
    assert status == 200 and text_of(json.loads(body)) == RIGHT[PATH]


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0)


# -- the connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", [directly, chunked])
async def test_connection_close(machine, pair, dial, way: Any, stream: bool) -> None:
    wire = await dial(machine.proxy.url)
    status, headers, raw = await way(wire, PATH, {**ASK, "stream": stream}, "Connection: close")
    assert status == 200 and headers.count(("connection", "close")) == 1
    assert (text_of_events(events(raw)) if stream else text_of(json.loads(raw))) == RIGHT[PATH]
    assert await soon(wire.reader.read()) == b""


async def test_one_after_the_other_on_one_connection_each_in_its_way(machine, pair, dial, taken) -> None:
    wire = await dial(machine.proxy.url)
    for number, way in enumerate([directly, chunked, directly, behind_another, directly, directly]):
        body = {**ASK, "stream": number % 2 == 0}
        status, _, raw = await way(wire, PATH, body)
        assert status == 200
        assert (text_of_events(events(raw)) if body["stream"] else text_of(json.loads(raw))) == RIGHT[PATH]
    wire.chunked = True
    assert (await directly(wire, PATH, ASK))[0] == 200
    assert len(taken) == 4


async def test_direct_requests_in_a_pipeline_are_answered_in_order(machine, pair, dial, taken) -> None:
    wire = await dial(machine.proxy.url)
    paths = list(REQUESTS) * 2
    for number, path in enumerate(paths):
        wire.post(path, {**REQUESTS[path], "stream": number % 2 == 0})
    for number, path in enumerate(paths):
        status, _, raw = await told(wire)
        assert status == 200
        assert (text_of_events(events(raw)) if number % 2 == 0 else text_of(json.loads(raw))) == RIGHT[path]
    assert taken == paths[:1], "what waits behind another goes through Quart"
    assert (await directly(wire, PATH, ASK))[0] == 200 and len(taken) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("together", [False, True])
async def test_garbage_behind_a_whole_request_is_refused_after_its_answer(
    machine, pair, dial, taken, stream: bool, together: bool
) -> None:
    wire = await dial(machine.proxy.url)
    with pair[0].faults.held():
        raw = json.dumps({**ASK, "stream": stream}).encode()
        head = b"POST %b HTTP/1.1\r\nHost: a\r\n%bContent-Length: %d\r\n\r\n" % (PATH.encode(), JSON, len(raw))
        wire.send(head + raw + b"nonsense\r\n\r\n" * together)
        await soon(until(lambda: taken))
        if not together:
            await soon(pair[0].wait_until(lambda state: state["held_at"]))
            wire.send(b"nonsense\r\n\r\n")
    status, _, body = await told(wire)
    assert status == 200
    assert (text_of_events(events(body)) if stream else text_of(json.loads(body))) == RIGHT[PATH]
    assert (await told(wire))[0] == 400
    assert await soon(wire.reader.read()) == b""


# -- the end


@pytest.mark.settings(decode_max_in_flight=1, shutdown_grace=0.6)
@pytest.mark.parametrize("is_chunked", [False, True], ids=["direct", "quart"])
async def test_the_time_is_over_for_who_waits_and_for_who_reads(machine, pair, dial, taken, is_chunked: bool) -> None:
    """One is in mid-stream and cut, one is queued and told."""
    pair[1].faults.hold("schedule", after=3)
    reader, queued = await dial(machine.proxy.url), await dial(machine.proxy.url)
    reader.chunked = queued.chunked = is_chunked
    reader.post(PATH, {**ASK, "stream": True})
    assert (await reader.head())[0] == 200
    queued.post(PATH, ASK)
    await soon(until(lambda: machine.proxy.services.admission_queue.waiting == 1))
    ending = asyncio.create_task(machine.proxy.stop())
    status, headers, raw = await queued.answer()
    check_error(status, headers, raw, 503, "service_unavailable")
    assert headers["Connection"] == "close" or not headers.get("Connection")
    rest = await soon(read_out(reader))
    assert rest and not rest.endswith(b"0\r\n\r\n"), "a visible cut"
    pair[1].faults.release()
    await soon(ending)
    assert machine.proxy.services.stats.in_flight == 0 and bool(taken) is not is_chunked


async def read_out(wire: Wire) -> bytes:
    found = b""
    try:
        while piece := await wire.reader.read(65536):
            found += piece
    except ConnectionError:
        pass
    return found
