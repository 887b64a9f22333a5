"""Which headers cross the proxy, towards the engines and back."""

from __future__ import annotations

import json

import aiohttp
import pytest
from multidict import CIMultiDict

from tests.simulated import REQUESTS

PATH = "/v1/completions"
BODY = json.dumps(REQUESTS[PATH]).encode()

PASSED = {
    "Authorization": "Bearer the-client's-own",
    "X-Custom": "déjà vu",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "tracestate": "a=1,b=2",
    "User-Agent": "a-client/1.0",
    "Accept": "application/json",
    "Cookie": "a=b",
    "X-Forwarded-For": "10.0.0.9",
    "Content-Type": "application/json; charset=utf-8",
}
STOPPED = {
    "Keep-Alive": "timeout=5",
    "TE": "trailers",
    "Trailer": "X-Later",
    "Proxy-Authorization": "Basic eDp5",
    "Proxy-Connection": "keep-alive",
    "X-data-parallel-rank": "3",
    "Expect": "100-continue",
}


async def sent(machine, headers) -> None:
    async with machine.http.post(machine.proxy.url + PATH, data=BODY, headers=headers) as answer:
        assert answer.status == 200, await answer.text()


async def test_the_clients_headers_reach_both_engines(machine, pair) -> None:
    await sent(machine, PASSED)
    for engine in pair:
        got = engine.received(PATH)[0].headers
        assert {name: got.getall(name) for name in PASSED} == {name: [value] for name, value in PASSED.items()}


async def test_a_repeated_header_stays_repeated(machine, pair) -> None:
    await sent(machine, CIMultiDict([("Content-Type", "application/json"), ("X-Tag", "a"), ("X-Tag", "b")]))
    assert [engine.received(PATH)[0].headers.getall("X-Tag") for engine in pair] == [["a", "b"]] * 2


async def test_headers_of_one_connection_and_of_the_kv_transfer_stay_behind(machine, pair) -> None:
    await sent(machine, {"Content-Type": "application/json", **STOPPED})
    for engine in pair:
        got = engine.received(PATH)[0].headers
        assert not [name for name in STOPPED if name in got]
        assert got["Host"] == engine.http_address


async def test_headers_that_connection_names_stay_behind(machine, pair) -> None:
    headers = {
        "Content-Type": "application/json",
        "Connection": "keep-alive, X-Hop ,x-other",
        "X-Hop": "1",
        "X-Other": "2",
    }
    await sent(machine, headers)
    for engine in pair:
        assert not {"x-hop", "x-other"} & {name.lower() for name in engine.received(PATH)[0].headers}


async def test_each_engine_gets_the_length_of_its_own_body_and_is_asked_for_plain_bytes(machine, pair) -> None:
    await sent(machine, {"Content-Type": "application/json", "Accept-Encoding": "gzip, br"})
    for engine in pair:
        got = engine.received(PATH)[0]
        assert got.headers.getall("Content-Length") == [str(len(got.body))]
        assert got.headers.getall("Accept-Encoding") == ["identity"]


async def test_a_chunked_body_reaches_both_engines(machine, pair) -> None:
    async def pieces():
        yield BODY[:20]
        yield BODY[20:]

    async with machine.http.post(
        machine.proxy.url + PATH, data=pieces(), headers={"Content-Type": "application/json"}
    ) as answer:
        assert answer.status == 200
    assert pair[1].received(PATH)[0].body == BODY
    assert all("Transfer-Encoding" not in engine.received(PATH)[0].headers for engine in pair)


@pytest.mark.settings(engine_api_key="engine-key")
async def test_the_engines_own_key_takes_the_place_of_the_clients(machine) -> None:
    pair = await machine.pair(api_key="engine-key")
    await sent(machine, {"Content-Type": "application/json", "Authorization": "Bearer the-client's-own"})
    for engine in pair:
        assert engine.received(PATH)[0].headers.getall("Authorization") == ["Bearer engine-key"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_the_headers_of_decodes_answer_reach_the_client(machine, pair, stream) -> None:
    kind = "text/event-stream; charset=utf-8" if stream else "application/json"
    headers = {
        "Content-Type": kind,
        "X-Engine": "vllm",
        "Cache-Control": "no-cache",
        "Retry-After": "1",
        "Keep-Alive": "timeout=9",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
    }
    body = b"data: [DONE]\n\n" if stream else b"{}"
    pair[1].faults.fail_next(200, body, headers, path=PATH)
    status, got, raw = await machine.send(PATH, BODY)
    assert (status, raw, got.getall("Content-Type")) == (200, body, [kind])
    assert (got["X-Engine"], got["Cache-Control"], got["Retry-After"]) == ("vllm", "no-cache", "1")
    assert "X-Hop" not in got and "timeout=9" not in got.values() and len(got.getall("Date")) == 1
    assert "Server" not in got


async def test_a_compressed_body_is_refused_because_engines_do_not_read_it(machine, pair) -> None:
    status, _, body = await machine.send(PATH, BODY, **{"Content-Encoding": "gzip"})
    assert status == 415 and json.loads(body)["error"]["code"] == "unsupported_media_type"
    assert not pair[0].received(PATH)


async def test_a_header_of_30_kilobytes_passes(machine, pair) -> None:
    async with aiohttp.ClientSession(max_field_size=65536) as http:
        headers = {"Content-Type": "application/json", "X-Long": "a" * 30_000}
        async with http.post(machine.proxy.url + PATH, data=BODY, headers=headers) as answer:
            assert answer.status == 200
    assert len(pair[1].received(PATH)[0].headers["X-Long"]) == 30_000
