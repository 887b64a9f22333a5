"""The last request of a connection: HTTP/1.0, Expect: 100-continue, Connection: close."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.conftest import Wire, soon
from tests.simulated import REQUESTS, RIGHT, check_error, events, text_of, text_of_events

PATH = "/v1/completions"
BODY = json.dumps(REQUESTS[PATH]).encode()


def send_1_0(wire: Wire, method: str, path: str, body: bytes = b"", *headers: str) -> None:
    length = [f"Content-Length: {len(body)}"] if body else []
    lines = [f"{method} {path} HTTP/1.0", "Host: proxy", "Content-Type: application/json", *length, *headers]
    wire.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


# -- HTTP/1.0


@pytest.mark.parametrize("origin", [(), ("Origin: https://a.example",)], ids=["", "browser"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.settings(cors_origins=("https://a.example",))
async def test_an_http_1_0_client_gets_no_chunks(machine, pair, dial, path: str, stream: bool, origin) -> None:
    wire = await dial(machine.proxy.url)
    send_1_0(wire, "POST", path, json.dumps({**REQUESTS[path], "stream": stream}).encode(), *origin)
    status, headers = await wire.head()
    body = await soon(wire.reader.read())
    assert status == 200 and headers["Connection"] == "close" and "Transfer-Encoding" not in headers
    assert headers.get("Content-Length", str(len(body))) == str(len(body))
    assert (text_of_events(events(body)) if stream else text_of(json.loads(body))) == RIGHT[path]


async def test_the_feed_of_the_page_has_no_chunks_for_http_1_0(machine, dial) -> None:
    wire = await dial(machine.proxy.url)
    send_1_0(wire, "GET", "/dashboard/events")
    status, headers = await wire.head()
    assert status == 200 and "Transfer-Encoding" not in headers
    assert (await soon(wire.reader.readline())).partition(b":")[0] in (b"event", b"id", b"data", b"retry", b"")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/livez", "/nowhere", "/metrics"])
async def test_other_routes_over_http_1_0(machine, dial, method: str, path: str) -> None:
    wire = await dial(machine.proxy.url)
    send_1_0(wire, method, path)
    status, headers = await wire.head()
    body = await soon(wire.reader.read())
    assert status == (404 if path == "/nowhere" else 200) and "Transfer-Encoding" not in headers
    assert len(body) == (int(headers["Content-Length"]) if method == "GET" else 0)


async def test_an_http_1_0_client_notices_that_its_stream_was_cut(machine, pair, dial) -> None:
    pair[1].faults.cut_stream_after(3)
    wire = await dial(machine.proxy.url)
    send_1_0(wire, "POST", PATH, json.dumps({**REQUESTS[PATH], "stream": True}).encode())
    assert (await wire.head())[0] == 200
    with pytest.raises(ConnectionResetError):
        await soon(wire.reader.read())
    await machine.unharmed(pair[0])


async def test_an_http_1_0_client_is_not_told_to_continue(machine, pair, dial) -> None:
    wire = await dial(machine.proxy.url)
    send_1_0(wire, "POST", PATH, BODY, "Expect: 100-continue")
    assert (await wire.head())[0] == 200


# -- Expect: 100-continue

REFUSED_BY_HEAD: dict[str, tuple[str, str, tuple[str, ...], int, str]] = {
    "no key": ("POST", PATH, (), 401, "invalid_api_key"),
    "too long": ("POST", PATH, ("Authorization: Bearer k",), 413, "request_too_large"),
    "too long for one engine": ("POST", "/tokenize", ("Authorization: Bearer k",), 413, "request_too_large"),
    "compressed": ("POST", PATH, ("Authorization: Bearer k", "Content-Encoding: br"), 415, "unsupported_media_type"),
    "no path": ("POST", "/nowhere", ("Authorization: Bearer k",), 404, "not_found"),
    "no method": ("PUT", PATH, ("Authorization: Bearer k",), 405, "method_not_allowed"),
    "no route": ("POST", "/v1/audio/speech", ("Authorization: Bearer k",), 501, "not_implemented"),
}
SIZE = 1_000_000


def start(wire: Wire, method: str, path: str, *headers: str) -> None:
    """The head of a request with a body of ``SIZE`` bytes."""
    lines = [f"{method} {path} HTTP/1.1", "Host: proxy", "Content-Type: application/json", *headers]
    wire.send("\r\n".join([*lines, f"Content-Length: {SIZE}", "", ""]))


async def rest(wire: Wire) -> bytes:
    """What follows until the proxy closes the connection; a reset is a failure."""
    return await soon(wire.reader.read())


@pytest.mark.settings(api_key="k", max_body_bytes=SIZE - 1)
@pytest.mark.parametrize("waits", [True, False], ids=["waits", "sends"])
@pytest.mark.parametrize("what", REFUSED_BY_HEAD)
async def test_a_head_that_is_refused_gets_its_status_and_no_100(machine, pair, dial, what: str, waits: bool) -> None:
    """Also if the client sends its body all the same, before it reads."""
    method, path, headers, status, code = REFUSED_BY_HEAD[what]
    wire = await dial(machine.proxy.url)
    start(wire, method, path, "Expect: 100-continue", *headers)
    if not waits:
        wire.send(b" " * SIZE)
        await soon(wire.writer.drain())
    got, answered, raw = await wire.answer()
    check_error(got, answered, raw, status, code)
    assert answered["Connection"] == "close" and await rest(wire) == b""


@pytest.mark.settings(api_key="k")
@pytest.mark.parametrize("line", ["HTTP/1.1", "HTTP/1.0"])
async def test_an_early_refusal_survives_the_upload_that_follows_it(machine, dial, line: str) -> None:
    """The client has said that this is its last request, and reads only after it has sent everything."""
    wire = await dial(machine.proxy.url)
    wire.send(f"POST {PATH} {line}\r\nHost: a\r\nConnection: close\r\nContent-Length: {SIZE}\r\n\r\n")
    assert (await wire.reader.read(12)) == b"HTTP/1.1 401"
    for _ in range(10):
        wire.send(b" " * (SIZE // 10))
        await soon(wire.writer.drain())
        await asyncio.sleep(0.002)
    assert b"invalid_api_key" in await rest(wire)


@pytest.mark.parametrize("path", [*REQUESTS, "/tokenize"])
async def test_100_precedes_an_answer_that_needs_the_body(machine, pair, dial, path: str) -> None:
    body: dict[str, Any] = REQUESTS.get(path, {"prompt": "a"})
    raw = json.dumps(body).encode()
    wire = await dial(machine.proxy.url)
    wire.start(path, f"Content-Length: {len(raw)}", "Expect: 100-continue")
    assert (await wire.head())[0] == 100
    wire.send(raw)
    status, headers, answer = await wire.answer()
    assert status == 200 and headers["Connection"] == "close" and (path not in RIGHT or text_of(json.loads(answer)))
    assert await rest(wire) == b""


async def test_100_in_a_pipeline_waits_for_the_answer_before_it(machine, pair, dial) -> None:
    wire = await dial(machine.proxy.url)
    with pair[0].faults.held():
        wire.post(PATH, BODY)
        wire.start(PATH, f"Content-Length: {len(BODY)}", "Expect: 100-continue")
        await soon(pair[0].wait_until(lambda state: state["held_at"]))
    assert (await wire.answer())[0] == 200
    assert (await wire.head())[0] == 100
    wire.send(BODY)
    assert (await wire.answer())[0] == 200
