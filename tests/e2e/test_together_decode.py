"""Engines of this project's own connector: a decode that fails, and clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from disagg_proxy.health.liveness import LivenessConnections
from disagg_sim import SimEngine
from tests.conftest import Wire, soon
from tests.e2e.together import (
    ASK,
    COMPLETIONS,
    OWN,
    RIGHT,
    TOKENS,
    clean,
    external,
    has_request,
    in_turn,
    meets,
    right,
    settings,
    transfers,
)
from tests.simulated import Machine, text_of_events


@pytest.fixture
async def pair(machine: Machine) -> tuple[SimEngine, SimEngine]:
    return await machine.pair(**OWN)


@pytest.fixture
def unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deaths that no lifeline tells of."""
    monkeypatch.setattr(LivenessConnections, "_on_change", lambda self, instance: None)


# -- decode fails


@in_turn
@pytest.mark.parametrize("how", ["500", "502", "reset", "close", "killed", "error in a 200"])
@pytest.mark.parametrize("stream", [False, True])
async def test_another_decode_with_a_new_transfer(unnoticed, machine: Machine, two, how: str, stream: bool) -> None:
    prefill, decodes = two
    victim = decodes[0]
    if how.isdigit():
        victim.faults.fail_next(int(how), b"no", path=COMPLETIONS)
    elif how == "killed":
        await victim.kill()
    elif how == "error in a 200":
        error = (
            b'{"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "code": 500}}'
        )
        event = b"data: %b\n\ndata: [DONE]\n\n" % error
        content = {"Content-Type": "text/event-stream" if stream else "application/json"}
        victim.faults.fail_next(200, event if stream else error, content, path=COMPLETIONS)
    else:
        (victim.faults.reset_next if how == "reset" else victim.faults.close_next)(path=COMPLETIONS, times=2)
    for _ in range(2):
        if stream:
            assert text_of_events(await soon(machine.stream(COMPLETIONS, ASK))) == RIGHT[COMPLETIONS]
        else:
            await right(machine.post(COMPLETIONS, ASK))
    assert machine.proxy.services.stats.failovers == 1
    ids = [params["transfer_id"] for params in transfers(prefill) if params]
    assert len(ids) == len(set(ids))
    await clean(machine, prefill, *(d for d in decodes if how != "killed" or d is not victim))


@settings(freeze_after_min=0.1, freeze_after_max=0.4)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_frozen_decode_is_replaced(machine: Machine, two, stream: bool) -> None:
    prefill, decodes = two
    for decode in decodes:
        decode.faults.hold("forward")
    body = {**ASK, "stream": stream}
    sent = asyncio.create_task(machine.send(COMPLETIONS, body))
    frozen, other = await first_asked(decodes)
    other.faults.release()
    status, _, _ = await soon(sent)
    assert status == 200
    assert machine.proxy.services.stats.failovers == 1
    assert external(other) == TOKENS - 1
    frozen.faults.release()
    await machine.proxy.until_pairs(2)
    await clean(machine, prefill, *decodes)


async def first_asked(decodes: list[SimEngine]) -> tuple[SimEngine, SimEngine]:
    waits = {asyncio.create_task(d.wait_until(lambda s: s["held_at"] == "forward")): d for d in decodes}
    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    for task in pending:
        task.cancel()
    first = waits[done.pop()]
    return first, next(d for d in decodes if d is not first)


@in_turn
async def test_tries_are_bounded(machine: Machine, two) -> None:
    prefill, decodes = two
    for decode in decodes:
        decode.faults.fail_next(502, b"broken", path=COMPLETIONS, times=9)
    status, _, body = await soon(machine.post(COMPLETIONS, ASK))
    assert status == 502 and "502" in body["error"]["message"]
    assert sum(len(decode.received(COMPLETIONS)) for decode in decodes) == 2
    await clean(machine, prefill, *decodes)


@in_turn
async def test_no_try_for_a_client_that_has_left(machine: Machine, two, dial: Callable[[str], Any]) -> None:
    prefill, decodes = two
    for decode in decodes:
        decode.faults.hang_next(path=COMPLETIONS)
    client = await dial(machine.proxy.url)
    client.post(COMPLETIONS, ASK)
    await soon(asyncio.wait([asyncio.create_task(has_request(d)) for d in decodes], return_when="FIRST_COMPLETED"))
    client.leave()
    await clean(machine, prefill, *decodes)
    assert sum(len(decode.received(COMPLETIONS)) for decode in decodes) == 1


@in_turn
async def test_a_refusal_of_decode_is_the_clients(machine: Machine, two) -> None:
    prefill, decodes = two
    for decode in decodes:
        decode.faults.fail_next(422, b'{"error": {"message": "not like this"}}', path=COMPLETIONS)
    status, _, body = await machine.post(COMPLETIONS, ASK)
    assert (status, body) == (422, {"error": {"message": "not like this"}})
    assert sum(len(decode.received(COMPLETIONS)) for decode in decodes) == 1
    await clean(machine, prefill, *decodes)


async def test_a_mistake_of_the_client(machine: Machine, pair) -> None:
    status, _, body = await machine.post(COMPLETIONS, {**ASK, "temperature": -1})
    assert status == 400 and "temperature" in body["error"]["message"]
    assert machine.proxy.services.stats.failovers == 0
    await clean(machine, *pair)


async def test_decode_broken_in_mid_stream_is_a_cut(machine: Machine, pair, dial) -> None:
    pair[1].faults.cut_stream_after(3)
    client = await dial(machine.proxy.url)
    client.post(COMPLETIONS, {**ASK, "stream": True})
    status, _ = await client.head()
    assert status == 200
    with pytest.raises(asyncio.IncompleteReadError):
        while await client.chunk():
            pass
    assert machine.proxy.services.stats.failovers == 0
    await clean(machine, *pair)


# -- the client leaves


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("moment", ["queue", "prefill", "prefilled", "decode", "stream"])
async def test_a_client_that_leaves(machine: Machine, pair, dial, moment: str, stream: bool) -> None:
    prefill, decode = pair
    if moment == "queue":
        prefill.faults.hold("schedule")
        decode.faults.hold("schedule")
    elif moment == "prefill":
        prefill.faults.hold("forward")
    elif moment == "prefilled":
        decode.faults.hang_next(path=COMPLETIONS)
    else:
        decode.faults.hold("answer", after=0 if moment == "decode" else 3)
    client: Wire = await dial(machine.proxy.url)
    client.post(COMPLETIONS, {**ASK, "max_tokens": 50, "stream": stream})
    if moment == "queue":
        await soon(prefill.wait_until(lambda s: s["held_at"] == "schedule"))
        await soon(decode.wait_until(lambda s: s["held_at"] == "schedule"))
    elif moment == "prefill":
        await meets(prefill, decode)
    elif moment == "prefilled":
        await soon(prefill.wait_until(lambda s: s["kv_waiting"] and s["finished"] == 1))
        await soon(has_request(decode))
    else:
        await soon(decode.wait_until(lambda s: s["held_at"] == "answer" and s["running"]))
    client.leave()
    await soon(machine.proxy.until_idle())
    prefill.faults.release()
    decode.faults.release()
    await clean(machine, prefill, decode)
    assert machine.proxy.services.stats.outcomes == {"client_left": 1}
    await right(machine.post(COMPLETIONS, ASK))
