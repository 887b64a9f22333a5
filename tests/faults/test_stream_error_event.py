"""STREAM_ERROR_EVENT=1: an error event precedes the cut of a stream, in the shape of the API in use."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import openai
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.conftest import Wire, soon
from tests.simulated import CHAT, REQUESTS

PATH = "/v1/completions"
BROKE = "The decode instance closed the connection without an answer."
ERROR = {"message": BROKE, "type": "upstream_error", "param": None, "code": "engine_disconnected"}

asked = pytest.mark.settings(stream_error_event=True)


@pytest.fixture
def dial(dial_either_way):
    """Every test here runs over both ways in."""
    return dial_either_way


async def chunks(wire: Wire) -> bytes:
    """A chunked body up to its cut: every chunk is complete, and the last one does not end it."""
    raw = await soon(wire.reader.read())
    found = b""
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        assert length and raw[length : length + 2] == b"\r\n", "a chunk is cut, or ends the body"
        found, raw = found + raw[:length], raw[length + 2 :]
    return found


async def cut_stream(machine, pair, dial, path: str, **body: Any) -> list[bytes]:
    """The events of a stream whose decode dies after two tokens."""
    decode = pair[1]
    decode.faults.hold("schedule", after=2)
    wire = await dial(machine.proxy.url)
    wire.post(path, {**REQUESTS[path], "stream": True, **body})
    assert (await wire.head())[0] == 200
    await decode.wait_until(lambda state: state["held_at"] == "schedule")
    await decode.kill()
    raw = await chunks(wire)
    assert raw.endswith(b"\n\n")
    return raw.removesuffix(b"\n\n").split(b"\n\n")


@asked
@pytest.mark.parametrize("path", REQUESTS)
async def test_the_event_has_the_shape_of_its_api(machine, pair, dial, path: str) -> None:
    *before, last = await cut_stream(machine, pair, dial, path)
    assert before and not any(b"error" in event for event in before)
    name, _, data = last.rpartition(b"data: ")
    if path == "/v1/messages":
        assert name == b"event: error\n" and json.loads(data) == {"type": "error", "error": ERROR}
    else:
        assert name == b"" and json.loads(data) == {"error": ERROR}
    await soon(machine.proxy.until_idle())
    assert machine.proxy.services.stats.outcomes == {"cut": 1}


@asked
@pytest.mark.parametrize("sizes", [(1,), (7,), (61,), (3, 150)])
async def test_no_event_before_it_is_in_part(machine, pair, dial, sizes: tuple[int, ...]) -> None:
    pair[1].faults.split_writes(sizes)
    *before, last = await cut_stream(machine, pair, dial, PATH)
    assert before and all(json.loads(event.removeprefix(b"data: "))["choices"] for event in before)
    assert json.loads(last.removeprefix(b"data: ")) == {"error": ERROR}


@asked
async def test_with_a_decode_that_computes(machine, dial) -> None:
    decode = await machine.engine("decode", connector="disagg_kv")
    await machine.proxy.until(lambda: bool(machine.proxy.services.registry.models()))
    decode.faults.split_writes((5,))
    decode.faults.hold("schedule", after=2)
    wire = await dial(machine.proxy.url)
    wire.post(PATH, {**REQUESTS[PATH], "stream": True})
    assert (await wire.head())[0] == 200
    await decode.wait_until(lambda state: state["held_at"] == "schedule")
    await decode.kill()
    *before, last, end = (await chunks(wire)).split(b"\n\n")
    assert end == b"" and json.loads(last.removeprefix(b"data: ")) == {"error": ERROR}
    assert all(json.loads(event.removeprefix(b"data: "))["choices"] for event in before)


@pytest.mark.settings(stream_error_event=True, shutdown_grace=0.6)
async def test_at_the_end_of_the_shutdown(machine, pair, dial) -> None:
    decode = pair[1]
    decode.faults.hold("schedule", after=2)
    wire = await dial(machine.proxy.url)
    wire.post(PATH, {**REQUESTS[PATH], "stream": True})
    assert (await wire.head())[0] == 200
    await decode.wait_until(lambda state: state["held_at"] == "schedule")
    ending = asyncio.create_task(machine.proxy.stop())
    *_, last, end = (await chunks(wire)).split(b"\n\n")
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert end == b"" and (error["code"], error["message"]) == ("service_unavailable", "The proxy is shutting down.")
    decode.faults.release()
    await soon(ending)


@asked
async def test_a_stream_that_ends_well_has_none(machine, pair) -> None:
    for path, body in REQUESTS.items():
        pair[1].faults.split_writes((50,))
        raw = (await machine.send(path, {**body, "stream": True}))[2]
        pair[1].faults.split_writes(())
        plain = (await machine.send(path, {**body, "stream": True}))[2]
        assert b"error" not in raw and raw.count(b"\n\n") == plain.count(b"\n\n") and raw[-14:] == plain[-14:]


@asked
async def test_the_official_clients_raise_it(machine, pair) -> None:
    url, decode = machine.proxy.url, pair[1]
    async with AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        for call in (
            client.completions.create(model="sim-model", prompt="x", max_tokens=8, stream=True),
            client.chat.completions.create(model="sim-model", messages=CHAT, max_tokens=8, stream=True),
        ):
            decode.faults.cut_stream_after(2)
            with pytest.raises(openai.APIError, match="without an answer") as failed:
                [chunk async for chunk in await call]
            assert failed.value.code == "engine_disconnected"
    async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as claude:
        decode.faults.cut_stream_after(2)
        with pytest.raises(anthropic.APIStatusError, match="without an answer") as cut:
            ask: Any = {"model": "sim-model", "max_tokens": 8, "messages": CHAT}
            [event async for event in await claude.messages.create(**ask, stream=True)]
        assert cut.value.body == {"type": "error", "error": ERROR}
    await machine.unharmed(*pair)
