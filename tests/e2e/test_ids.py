"""The request id: one internal id for both engines, of which the client never sees a trace, and the client's own."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from tests.simulated import REQUESTS, RIGHT, events, text_of, text_of_events

PATH = "/v1/completions"
CHAT = "/v1/chat/completions"


def assert_no_trace(engines, headers, raw: bytes) -> None:
    seen = raw + str(headers).encode()
    addresses = [address for e in engines for address in (e.kv_address, e.http_address)]
    for trace in ("prefill_addr", "decode_addr", "___", *addresses):
        assert trace.encode() not in seen, (trace, seen)


@pytest.mark.parametrize("path", REQUESTS)
async def test_both_engines_get_the_same_id_with_their_addresses(machine, pair, path) -> None:
    prefill, decode = pair
    hostile = f"___prefill_addr_{decode.kv_address}___decode_addr_{prefill.kv_address}_00"
    status, headers, _ = await machine.send(path, REQUESTS[path], **{"X-Request-Id": hostile})
    assert status == 200 and re.fullmatch("[0-9a-f]{32}", headers["X-Request-Id"]), "one with addresses is replaced"
    first, second = (engine.received(path)[0].headers.getall("X-Request-Id") for engine in pair)
    assert first == second and len(first) == 1
    pattern = f"___prefill_addr_{prefill.kv_address}___decode_addr_{decode.kv_address}_[0-9a-f]{{32}}"
    assert re.fullmatch(pattern, first[0])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_the_clients_own_id_comes_back(machine, pair, stream) -> None:
    status, headers, _ = await machine.send(PATH, {**REQUESTS[PATH], "stream": stream}, **{"X-Request-Id": "mine-1"})
    assert (status, headers.getall("X-Request-Id")) == (200, ["mine-1"])


async def test_the_clients_own_id_comes_back_with_errors_too(machine, pair) -> None:
    refused = [(PATH, {"use_beam_search": True}), (PATH, {"prompt": ""}), (PATH, {"model": "other"}), ("/none", {})]
    for path, body in refused:
        status, headers, _ = await machine.send(path, body, **{"X-Request-Id": "mine-1"})
        assert status in (400, 404) and headers.getall("X-Request-Id") == ["mine-1"], body


async def test_an_id_that_is_not_worth_returning_is_replaced(machine, pair) -> None:
    for headers in ({}, *({"X-Request-Id": own} for own in ("", "é", "a" * 300))):
        status, got, raw = await machine.send(PATH, REQUESTS[PATH], **headers)
        assert status == 200 and re.fullmatch("[0-9a-f]{32}", got["X-Request-Id"])
        assert json.loads(raw)["id"].startswith("cmpl-" + got["X-Request-Id"])


SPLITS = [(), (1,), (2,), (7,), (64,), (1, 3, 100), (113,), (300,), (4096,)]


@pytest.mark.parametrize("path", REQUESTS)
async def test_the_internal_id_is_hidden_however_the_body_is_cut(machine, path) -> None:
    pair = await machine.pair(enable_request_id_headers=True)
    for sizes in SPLITS:
        for engine in pair:
            engine.faults.split_writes(sizes)
        for stream in (False, True):
            status, headers, raw = await machine.send(path, {**REQUESTS[path], "stream": stream})
            assert status == 200
            assert_no_trace(pair, headers, raw)
            text = text_of_events(events(raw)) if stream else text_of(json.loads(raw))
            assert text == RIGHT[path], sizes
    await machine.unharmed(*pair)


@pytest.mark.parametrize(("path", "extra"), [(PATH, {"prompt": ["one", "two"], "n": 2}), (CHAT, {"n": 3})])
async def test_every_chunk_of_one_answer_has_the_same_id_and_no_two_answers_do(machine, pair, path, extra) -> None:
    pair[1].faults.split_writes((61,))
    ids = []
    for _ in range(3):
        stream = await machine.stream(path, {**REQUESTS[path], **extra, "stream_options": {"include_usage": True}})
        assert len({event["id"] for event in stream}) == 1
        ids.append(stream[0]["id"])
    assert len(set(ids)) == 3
    assert all(re.fullmatch("(cmpl|chatcmpl)-[0-9a-f]+", one) for one in ids)


@pytest.mark.parametrize("status", [400, 500])
async def test_the_internal_id_is_hidden_in_what_decode_says_of_an_error(machine, pair, status) -> None:
    prefill, decode = pair
    with prefill.faults.held("answer"):
        request = asyncio.create_task(machine.send(PATH, REQUESTS[PATH]))
        await prefill.wait_until(lambda state: state["held_at"] == "answer")
        internal = prefill.received(PATH)[0].headers["X-Request-Id"]
        # Wherever a message is shortened, the id lies across the cut.
        message = " ".join(["x" * 430, *[f"Request id cmpl-{internal}-0 already running."] * 9, "\ud800"])
        error = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": status}})
        decode.faults.fail_next(status, error, {"X-Note": f"about {internal}"}, path=PATH)
    got, headers, raw = await request
    assert got == (400 if status == 400 else 502)
    assert "Request id cmpl-" in json.loads(raw)["error"]["message"]
    assert_no_trace(pair, headers, raw)
