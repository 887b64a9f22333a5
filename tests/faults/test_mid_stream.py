"""Decode fails after the answer has begun: the client sees a cut, nothing is added, and the log says why, once."""

import asyncio
import json
import logging

import aiohttp
import pytest

from disagg_proxy.telemetry.logs import HideUnfinished
from disagg_sim import expected_text
from tests.conftest import soon
from tests.simulated import PROMPT, REQUESTS, RIGHT, check_error, text_of, text_of_events

PATH = "/v1/completions"
STREAM = {**REQUESTS[PATH], "stream": True}


def whole_events(raw: bytes) -> list[dict]:
    """The events of a stream that was cut, each of which must be whole and none of which may be an error."""
    *lines, rest = raw.split(b"\n\n")
    assert rest == b""
    found = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    assert not any("error" in event for event in found)
    return found


async def read_until_cut(answer: aiohttp.ClientResponse) -> bytes:
    """What came before the cut; the client must notice the cut."""
    raw = b""
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
        async for piece in answer.content.iter_any():
            raw += piece
    return raw


def check_logged_once(caplog: pytest.LogCaptureFixture, cause: str) -> None:
    shown = [r for r in caplog.records if r.levelno >= logging.WARNING and HideUnfinished().filter(r)]
    assert [record.getMessage() for record in shown] == [f"An answer was cut off: {cause}"]
    assert shown[0].exc_info is None


BROKE = "The decode instance closed the connection without an answer."


async def test_a_break_before_the_first_token_is_no_answer_at_all(machine, pair) -> None:
    decode = pair[1]
    decode.faults.cut_stream_after(0)
    check_error(*await machine.send(PATH, STREAM), 502, "engine_disconnected")
    await soon(machine.proxy.until_idle())
    assert machine.proxy.services.stats.outcomes == {"engine_error": 1}
    there = machine.proxy.instance(decode.http_address)
    assert (there.in_flight, there.failures_total) == (0, 1)
    assert len(decode.received(PATH)) == 1, "it may have been taken in"


@pytest.mark.parametrize("tokens", [1, 5])
async def test_a_stream_that_decode_breaks_off_is_cut(machine, pair, caplog, tokens: int) -> None:
    decode = pair[1]
    decode.faults.cut_stream_after(tokens)
    async with machine.http.post(machine.proxy.url + PATH, json=STREAM) as answer:
        assert answer.status == 200
        raw = await soon(read_until_cut(answer))
    # A reset may overtake what was sent before it, so not every event need arrive.
    found = whole_events(raw)
    assert len(found) <= tokens
    assert expected_text(PROMPT, 8).startswith(text_of_events(found))
    await soon(machine.proxy.until_idle())
    check_logged_once(caplog, BROKE)
    assert machine.proxy.services.stats.outcomes == {"cut": 1}
    there = machine.proxy.instance(decode.http_address)
    assert (there.in_flight, there.failures_total) == (0, 1)
    assert len(decode.received(PATH)) == 1
    await machine.unharmed(*pair)
    assert text_of((await machine.post(PATH, REQUESTS[PATH]))[2]) == RIGHT[PATH]


@pytest.fixture
def dial(dial_either_way):
    """Every test here runs over both ways in."""
    return dial_either_way


@pytest.mark.parametrize("path", REQUESTS)
async def test_the_cut_is_no_proper_end_of_the_body(machine, pair, dial, path: str) -> None:
    decode = pair[1]
    decode.faults.hold("schedule", after=2)
    wire = await dial(machine.proxy.url)
    wire.post(path, {**REQUESTS[path], "stream": True})
    status, headers = await wire.head()
    assert (status, headers["Transfer-Encoding"]) == (200, "chunked")
    raw = await wire.chunk()
    await decode.wait_until(lambda state: state["held_at"] == "schedule")
    await decode.kill()
    raw += await soon(wire.reader.read())
    assert not raw.endswith(b"0\r\n\r\n") and b"error" not in raw and b"HTTP/1.1" not in raw
    assert b"[DONE]" not in raw and b"message_stop" not in raw


@pytest.mark.settings(decode_timeout=0.2)
async def test_a_stream_that_falls_silent_is_cut_after_the_deadline(machine, pair, caplog) -> None:
    decode = pair[1]
    decode.faults.hold("schedule", after=3)
    async with machine.http.post(machine.proxy.url + PATH, json=STREAM) as answer:
        raw = await soon(read_until_cut(answer))
    assert len(whole_events(raw)) == 3
    decode.faults.release()
    await soon(machine.proxy.until_idle())
    check_logged_once(caplog, "The decode instance sent nothing for 0.2 s.")
    await machine.unharmed(*pair)


async def test_other_streams_go_on_when_one_is_cut(machine, pair) -> None:
    decode = pair[1]

    async def ask() -> bytes | None:
        async with machine.http.post(machine.proxy.url + PATH, json=STREAM) as answer:
            try:
                return await answer.read()
            except aiohttp.ClientError:
                return None

    decode.faults.cut_stream_after(3)
    answers = await soon(asyncio.gather(*(ask() for _ in range(5))))
    assert answers.count(None) == 1
    assert all(raw is None or raw.endswith(b"data: [DONE]\n\n") for raw in answers)
    await machine.unharmed(*pair)


async def test_an_error_event_of_the_engine_itself_passes_and_the_stream_ends_properly(machine, pair, caplog) -> None:
    decode = pair[1]
    decode.faults.hold("schedule", after=2)
    async with machine.http.post(machine.proxy.url + PATH, json=STREAM) as answer:
        await decode.wait_until(lambda state: state["held_at"] == "schedule")
        direct = asyncio.create_task(machine.http.post(f"http://{decode.http_address}{PATH}", json=REQUESTS[PATH]))
        await decode.wait_until(lambda state: state["waiting"] == 1)
        decode.faults.release()
        assert (await soon(direct)).status == 500, "a request without addresses in its id kills an engine"
        raw = await soon(answer.read())
    assert b'"error"' in raw and raw.endswith(b"data: [DONE]\n\n"), "what vLLM says when its engine dies in mid-stream"
    await soon(machine.proxy.until_idle())
    assert machine.proxy.services.stats.outcomes == {"cut": 1}
    assert machine.proxy.instance(decode.http_address).failures_total == 1
    logged = [record.getMessage() for record in caplog.records if "an error in its stream" in record.getMessage()]
    assert len(logged) == 1 and "status 500" in logged[0]
