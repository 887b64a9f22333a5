"""SIGTERM: what runs gets the grace time to finish, drains included; nothing new is taken in."""

import asyncio
import json

import pytest

from tests.conftest import Wire, soon
from tests.e2e.conftest import REQUESTS, events, text_of_events
from tests.e2e.test_disconnects import left

PATH = "/v1/completions"
STREAM = {**REQUESTS[PATH], "max_tokens": 40, "stream": True}


class Shutdown:
    """The proxy's end, begun as by a signal."""

    def __init__(self, machine) -> None:
        self.proxy = machine.proxy
        self._began = asyncio.Event()
        self._end = asyncio.Event()

    async def begin(self) -> None:
        """Return when the proxy takes no new connections."""
        server = self.proxy.server
        close = server.servers[0].close

        def note() -> None:
            close()
            self._began.set()

        server.servers[0].close = note
        self._ended = asyncio.create_task(self.proxy.stop())
        await soon(self._began.wait())

    async def end(self) -> None:
        await soon(self._ended, 20)


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


async def test_a_running_stream_finishes_and_then_the_proxy_ends(machine, pair, dial, shutdown: Shutdown) -> None:
    client = await begin_stream(machine, pair, dial)
    await shutdown.begin()
    with pytest.raises(ConnectionError):
        await dial(machine.proxy.url)
    pair[1].faults.release()
    status, _, raw = await client.answer()
    assert status == 200 and len(events(raw)) == STREAM["max_tokens"] and text_of_events(events(raw))
    await shutdown.end()


async def test_a_request_still_in_its_prefill_is_answered(machine, pair, dial, shutdown: Shutdown) -> None:
    prefill = pair[0]
    client = await dial(machine.proxy.url)
    with prefill.faults.held():
        client.post(PATH, STREAM)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "schedule"))
        await shutdown.begin()
    status, _, raw = await client.answer()
    assert status == 200 and len(events(raw)) == STREAM["max_tokens"]
    await shutdown.end()
    await machine.unharmed(*pair)


async def test_the_connection_closes_after_its_last_answer(machine, pair, dial, shutdown: Shutdown) -> None:
    client = await begin_stream(machine, pair, dial)
    idle = await dial(machine.proxy.url)
    idle.send("GET /livez HTTP/1.1\r\nHost: proxy\r\n\r\n")
    assert (await idle.answer())[0] == 200
    await shutdown.begin()
    assert await soon(idle.reader.read()) == b""
    pair[1].faults.release()
    await client.answer()
    assert await soon(client.reader.read()) == b""
    await shutdown.end()


async def test_drains_finish_before_the_proxy_ends(machine, pair, dial, shutdown: Shutdown) -> None:
    prefill, decode = pair
    client = await dial(machine.proxy.url)
    with prefill.faults.held():
        client.post(PATH, STREAM)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "schedule"))
        await left(machine, client)
        await shutdown.begin()
        assert not decode.received(PATH)
    await shutdown.end()
    assert machine.proxy.services.stats.drains.done == 1
    await machine.unharmed(*pair)


@pytest.mark.settings(shutdown_grace=1.0)
async def test_what_takes_longer_than_the_grace_time_is_cut(machine, pair, dial, shutdown: Shutdown, caplog) -> None:
    client = await begin_stream(machine, pair, dial)
    await shutdown.begin()
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
        await shutdown.begin()
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
        await left(machine, client)
    await soon(decode.wait_until(lambda state: decode.received(PATH)))
    await shutdown.begin()
    await shutdown.end()
    assert "1 background requests did not end" in caplog.text
