"""A client that does not read holds back its own stream, and nothing else."""

import asyncio

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from disagg_proxy.upstream import Response
from disagg_sim import expected_text
from tests.conftest import soon
from tests.faults.conftest import LARGE, dial_slowly
from tests.simulated import PROMPT, REQUESTS, RIGHT, events, text_of, text_of_events

PATH = "/v1/completions"


@pytest.fixture
def read_from_decode(monkeypatch) -> list[int]:
    """The sizes of all pieces that the proxy has read from decode."""
    sizes: list[int] = []
    original = Response.on_data

    def received(self: Response, piece: bytes) -> None:
        sizes.append(len(piece))
        original(self, piece)

    monkeypatch.setattr(Response, "on_data", received)
    return sizes


@pytest.fixture
def paused(monkeypatch) -> asyncio.Event:
    """Set when the proxy's server has been told by TCP to stop writing."""
    event = asyncio.Event()
    original = FlowControl.pause_writing

    def pause_writing(self: FlowControl) -> None:
        original(self)
        event.set()

    monkeypatch.setattr(FlowControl, "pause_writing", pause_writing)
    return event


async def test_a_client_that_does_not_read_holds_back_only_its_own_stream(
    machine, pair, paused: asyncio.Event, read_from_decode: list[int]
) -> None:
    _prefill, decode = pair
    client = await dial_slowly(machine.proxy)
    client.post(PATH, LARGE)
    try:
        await soon(paused.wait())
        # The engine goes on (as vLLM does); what it says waits on its side, not in the proxy.
        await soon(decode.wait_until(lambda state: state["finished"] == 1))
        assert text_of((await machine.post(PATH, REQUESTS[PATH]))[2]) == RIGHT[PATH]
        await soon(machine.proxy.until_clients(1))
        held = sum(read_from_decode)

        _, _, raw = await soon(client.answer())
        assert held < 500_000 < 2_000_000 < len(raw)
        assert text_of_events(events(raw)) == expected_text(PROMPT, LARGE["max_tokens"], ignore_eos=True)
    finally:
        client.leave()
    await soon(machine.proxy.until_idle())
    await machine.unharmed(*pair)


async def test_a_client_that_never_reads_and_leaves_frees_everything(machine, pair, paused: asyncio.Event) -> None:
    decode = pair[1]
    client = await dial_slowly(machine.proxy)
    client.post(PATH, LARGE)
    await soon(paused.wait())
    client.leave()
    await soon(machine.proxy.until_idle())
    await machine.unharmed(*pair)
    assert machine.proxy.services.stats.outcomes == {"client_left": 1}
    assert machine.proxy.instance(decode.http_address).in_flight == 0
