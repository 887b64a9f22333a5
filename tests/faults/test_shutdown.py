"""SIGTERM: what runs gets the grace time to finish, drains included; nothing new is taken in."""

import asyncio
import json
import socket
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from disagg_proxy.server import http_server
from tests.conftest import Wire, soon
from tests.simulated import REQUESTS, events, text_of_events

PATH = "/v1/completions"
STREAM = {**REQUESTS[PATH], "max_tokens": 40, "stream": True}


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0)


class Shutdown:
    """The proxy's end, begun as by a signal."""

    def __init__(self, machine) -> None:
        self.proxy = machine.proxy

    def begin(self) -> None:
        self._ended = asyncio.create_task(self.proxy.stop())
        self.proxy.server.on_signal()

    async def end(self) -> None:
        await soon(self._ended)

    @property
    def over(self) -> bool:
        return self._ended.done()


@pytest.fixture
def dial(dial_either_way):
    """Every test here runs over both ways in."""
    return dial_either_way


@pytest.fixture
def shutdown(machine) -> Shutdown:
    return Shutdown(machine)


async def begin_stream(machine, pair, dial, tokens: int = 3) -> Wire:
    """A stream that is held up after some tokens."""
    decode = pair[1]
    decode.faults.hold("schedule", after=tokens)
    client = await dial(machine.proxy.url)
    client.post(PATH, STREAM)
    await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
    return client


def is_refusal(answer: tuple[int, Any, bytes]) -> bool:
    status, headers, raw = answer
    assert (status, json.loads(raw)["error"]["code"]) == (503, "service_unavailable"), answer
    assert "shutting down" in json.loads(raw)["error"]["message"]
    return headers["Connection"] == "close" and int(headers["Retry-After"]) >= 1


async def test_a_running_stream_finishes_and_then_the_proxy_ends(machine, pair, dial, shutdown: Shutdown) -> None:
    client = await begin_stream(machine, pair, dial)
    shutdown.begin()
    pair[1].faults.release()
    status, _, raw = await client.answer()
    assert status == 200 and len(events(raw)) == STREAM["max_tokens"] and text_of_events(events(raw))
    await shutdown.end()
    with pytest.raises(ConnectionError):
        await dial(machine.proxy.url)


async def test_whoever_comes_meanwhile_is_told_on_kept_and_on_new_connections(machine, pair, dial, shutdown) -> None:
    kept, silent = await dial(machine.proxy.url), await dial(machine.proxy.url)
    kept.send("GET /livez HTTP/1.1\r\nHost: proxy\r\n\r\n")
    assert (await kept.answer())[0] == 200
    client = await begin_stream(machine, pair, dial)
    asked = len(pair[0].requests)
    shutdown.begin()
    for path in (PATH, "/tokenize", "/v1/models", "/nothing"):
        for wire in (kept, await dial(machine.proxy.url)):
            wire.post(path, REQUESTS[PATH])
            assert is_refusal(await wire.answer())
            assert await soon(wire.reader.read()) == b""
            wire.leave()
        kept = await dial(machine.proxy.url)
    assert not shutdown.over and not [r for r in pair[0].requests[asked:] if r.method == "POST"]
    pair[1].faults.release()
    assert (await client.answer())[0] == 200
    assert await soon(silent.reader.read()) == b""
    await shutdown.end()


async def test_health_says_so_at_once_and_the_rest_of_the_state_is_still_told(machine, pair, dial, shutdown) -> None:
    client = await begin_stream(machine, pair, dial)
    shutdown.begin()
    wire = await dial(machine.proxy.url)
    wire.send("GET /health?a=b HTTP/1.1\r\nHost: proxy\r\n\r\n")
    status, headers, raw = await wire.answer()
    body = json.loads(raw)
    assert (status, body["status"], headers["Connection"]) == (503, "stopping", "close")
    assert body["missing"] == ["the proxy is shutting down"] and body["pairs"] == 1
    assert (await machine.get("/livez"))[0] == 200
    assert (await machine.get("/stats"))[1]["requests"]["in_flight"] == 1
    pair[1].faults.release()
    assert (await client.answer())[0] == 200
    await shutdown.end()


@pytest.mark.parametrize("part", ["head", "body"])
async def test_a_request_that_is_not_here_whole_is_refused(machine, pair, dial, shutdown, part: str) -> None:
    client = await begin_stream(machine, pair, dial)
    late = await dial(machine.proxy.url)
    if part == "head":
        late.send(f"POST {PATH} HTTP/1.1\r\nHost: pro")
        await soon(until(lambda: any(c._part for c in machine.proxy.server.server_state.connections)))
    else:
        late.start(PATH, "Content-Length: 100000")
        late.send(b'{"prompt": "')
        await soon(until(lambda: machine.proxy.exchanges == 2))
    shutdown.begin()
    assert is_refusal(await late.answer())
    late.send(b"x" * 1000)
    assert await soon(late.reader.read()) == b""
    late.leave()
    pair[1].faults.release()
    assert (await client.answer())[0] == 200
    await shutdown.end()


@pytest.mark.settings(decode_max_in_flight=1)
async def test_what_waits_in_the_queue_was_accepted_and_is_served(machine, pair, dial, shutdown) -> None:
    client = await begin_stream(machine, pair, dial)
    queued = await dial(machine.proxy.url)
    queued.post(PATH, STREAM)
    await soon(until(lambda: machine.proxy.services.admission_queue.waiting == 1))
    shutdown.begin()
    pair[1].faults.release()
    for wire in (client, queued):
        status, _, raw = await wire.answer()
        assert status == 200 and len(events(raw)) == STREAM["max_tokens"]
    await shutdown.end()
    await machine.unharmed(*pair)


async def test_a_request_still_in_its_prefill_is_answered(machine, pair, dial, shutdown: Shutdown) -> None:
    prefill = pair[0]
    client = await dial(machine.proxy.url)
    with prefill.faults.held():
        client.post(PATH, STREAM)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "schedule"))
        shutdown.begin()
    status, _, raw = await client.answer()
    assert status == 200 and len(events(raw)) == STREAM["max_tokens"]
    await shutdown.end()
    await machine.unharmed(*pair)


async def test_the_connection_closes_after_its_last_answer(machine, pair, dial, shutdown: Shutdown) -> None:
    client = await begin_stream(machine, pair, dial)
    second = await dial(machine.proxy.url)
    with pair[0].faults.held():
        second.post(PATH, STREAM)
        await soon(pair[0].wait_until(lambda state: state["held_at"] == "schedule"))
        shutdown.begin()
    pair[1].faults.release()
    for wire in (client, second):
        status, headers, _ = await wire.answer()
        assert status == 200 and await soon(wire.reader.read()) == b""
    assert headers["Connection"] == "close", "the one that had no head of an answer yet is told"
    await shutdown.end()


async def test_drains_finish_before_the_proxy_ends(machine, pair, dial, shutdown: Shutdown) -> None:
    prefill, decode = pair
    client = await dial(machine.proxy.url)
    with prefill.faults.held():
        client.post(PATH, STREAM)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "schedule"))
        await machine.left(client)
        shutdown.begin()
        assert not decode.received(PATH)
    await shutdown.end()
    assert machine.proxy.services.stats.kv_releases.done == 1
    await machine.unharmed(*pair)


@pytest.mark.settings(shutdown_grace=1.0)
async def test_what_takes_longer_than_the_grace_time_is_cut(machine, pair, dial, shutdown: Shutdown, caplog) -> None:
    client = await begin_stream(machine, pair, dial)
    shutdown.begin()
    await shutdown.end()
    assert "An answer was cut off: the grace time" in caplog.text and "Traceback" not in caplog.text
    raw = await soon(client.reader.read())
    assert not raw.endswith(b"0\r\n\r\n") and b"[DONE]" not in raw
    pair[1].faults.release()
    await soon(pair[1].wait_until(lambda state: state["aborted"] == 1))
    await machine.unharmed(*pair)


@pytest.mark.settings(shutdown_grace=1.0)
async def test_a_request_without_an_answer_by_then_is_503_as_json(machine, pair, dial, shutdown: Shutdown) -> None:
    client = await dial(machine.proxy.url)
    with pair[0].faults.held():
        client.post(PATH, STREAM)
        await soon(pair[0].wait_until(lambda state: state["held_at"] == "schedule"))
        shutdown.begin()
        status, headers, raw = await client.answer()
    assert (status, json.loads(raw)["error"]["code"]) == (503, "service_unavailable") and headers["Retry-After"]
    await shutdown.end()


@pytest.mark.settings(shutdown_grace=0.3)
async def test_a_drain_that_hangs_is_given_up_after_the_grace_time(machine, pair, dial, shutdown, caplog) -> None:
    prefill, decode = pair
    client = await dial(machine.proxy.url)
    decode.faults.hang_next(path=PATH)
    with prefill.faults.held():
        client.post(PATH, STREAM)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "schedule"))
        await machine.left(client)
    await soon(decode.wait_until(lambda state: decode.received(PATH)))
    shutdown.begin()
    await shutdown.end()
    assert "Cancelled 1 background requests" in caplog.text


@pytest.mark.settings(shutdown_grace=2.0)
async def test_the_grace_time_is_counted_once(machine, pair, dial, shutdown, caplog) -> None:
    """A stream that takes all of it, and a drain that would take as long again."""
    prefill, decode = pair
    orphan = await dial(machine.proxy.url)
    with prefill.faults.held():
        orphan.post(PATH, STREAM)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "schedule"))
        await machine.left(orphan)
        decode.faults.hang_next(path=PATH)
    await soon(decode.wait_until(lambda state: decode.received(PATH)))
    client = await begin_stream(machine, pair, dial)
    clock = asyncio.get_running_loop().time
    begun = clock()
    shutdown.begin()
    raw = await soon(client.reader.read())
    cut_after = clock() - begun
    await shutdown.end()
    assert b"[DONE]" not in raw
    assert 1.55 < cut_after < 1.95 < clock() - begun < 3.0, "a fifth is kept for what is left on the instances"
    assert "An answer was cut off" in caplog.text and "Cancelled 1 background requests" in caplog.text


@pytest.mark.settings(shutdown_grace=600.0)
@pytest.mark.parametrize("phase", ["requests", "background"])
async def test_a_second_signal_ends_it_at_once(machine, pair, dial, shutdown, caplog, phase: str) -> None:
    prefill, decode = pair
    if phase == "requests":
        client = await begin_stream(machine, pair, dial)
    else:
        decode.faults.hang_next(path=PATH)
        client = await dial(machine.proxy.url)
        with prefill.faults.held():
            client.post(PATH, STREAM)
            await soon(prefill.wait_until(lambda state: state["held_at"] == "schedule"))
            await machine.left(client)
        await soon(decode.wait_until(lambda state: decode.received(PATH)))
    shutdown.begin()
    assert (await machine.get("/health"))[1]["status"] == "stopping" and not shutdown.over
    machine.proxy.server.on_signal()
    await shutdown.end()
    assert "Stopping at once" in caplog.text and "Traceback" not in caplog.text
    if phase == "requests":
        raw = await soon(client.reader.read())
        assert raw and b"[DONE]" not in raw


@pytest.mark.settings(shutdown_grace=1.0)
async def test_a_client_that_takes_nothing_of_its_answer_is_not_waited_for(
    machine, pair, dial, shutdown, monkeypatch
) -> None:
    paused = asyncio.Event()
    pause_writing = FlowControl.pause_writing

    def pause(flow: FlowControl) -> None:
        pause_writing(flow)
        paused.set()

    monkeypatch.setattr(FlowControl, "pause_writing", pause)
    machine.proxy.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
    client = await dial(machine.proxy.url)
    client.writer.transport.pause_reading()
    client.post(PATH, {**STREAM, "max_tokens": 9000, "ignore_eos": True, "logprobs": 20})
    await soon(paused.wait())
    monkeypatch.setattr(http_server, "_CANCEL_TIMEOUT", 600.0)
    shutdown.begin()
    await shutdown.end()
