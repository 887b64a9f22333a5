"""A stalled engine, seen by several workers that each know their own requests only."""

from __future__ import annotations

import asyncio

from disagg_sim import expected_text
from tests.command import engine_process
from tests.conftest import soon
from tests.workers.conftest import ASK, PATH, until

SOON = {"FREEZE_AFTER_MIN": "2", "FREEZE_AFTER_MAX": "2", "PROBE_INTERVAL": "1"}
FOREIGN = "___prefill_addr_127.0.0.1:9___decode_addr_{}_0123"


async def test_a_decode_is_freed_by_the_worker_that_knows_the_lost_prefill(fleet, engines, http) -> None:
    """The KV that it waits for is a request's of one worker; those of the other wait with it, and replay nothing."""
    proxy = await fleet(2, **SOON)
    prefill, decode = pair = await engines(proxy.zmq)
    for engine in pair:
        await proxy.until_known(engine)
    doors = [door for _ in range(3) for door in await proxy.doors()]
    decode.faults.lose_kv(1)
    lost = asyncio.create_task(doors[0].ask())
    await soon(decode.wait_until(lambda state: state["stalled_on"] is not None))
    others = [asyncio.create_task(door.ask()) for door in doors[1:]]
    for task in (lost, *others):
        status, body = await soon(task)
        assert (status, body["choices"][0]["text"]) == (200, expected_text(ASK["prompt"], 8))
    shown = await doors[0].instance(decode)
    assert shown["replays"] >= 1 and not shown["restart_wanted"]
    assert shown["freezes"] == 1, "two workers have found one freeze"
    ids = [request.headers["X-Request-Id"] for request in prefill.received(PATH)]
    assert len(ids) - len(set(ids)) == shown["replays"] <= 2
    await until(lambda: _state_everywhere(doors, decode, "ready"))
    for door in doors[:2]:
        assert (await door.ask())[0] == 200
    await soon(decode.wait_until(lambda state: not state["running"] and not state["kv_waiting"]))


async def test_a_stall_that_no_worker_can_end_is_given_up_by_all(fleet, engines, http) -> None:
    proxy = await fleet(2, **SOON)
    prefill, decode = pair = await engines(proxy.zmq)
    for engine in pair:
        await proxy.until_known(engine)
    doors = [door for _ in range(2) for door in await proxy.doors()]
    foreign = {"X-Request-Id": FOREIGN.format(decode.kv_address)}

    async def stick() -> None:
        async with http.post(f"http://{decode.http_address}{PATH}", json=ASK, headers=foreign) as answer:
            await answer.read()

    stuck = asyncio.ensure_future(stick())
    await soon(decode.wait_until(lambda state: state["stalled_on"] is not None))
    # Only one worker has a request there.
    status, body = await soon(doors[0].ask())
    assert (status, body["error"]["code"]) == (504, "engine_frozen")
    await until(lambda: _state_everywhere(doors, decode, "frozen", restart=True))
    for door in doors[:2]:
        shown = await door.instance(decode)
        assert shown["freezes"] == 1 and shown["replays"] == 1
        status, body = await door.ask()
        assert status == 503 and "stalled" in body["error"]["message"]
    seen = len(proxy.lines)
    await decode.kill()
    await prefill.kill()
    await asyncio.gather(stuck, return_exceptions=True)
    for engine in pair:
        await proxy.until_gone(engine, seen)
    for engine in pair:
        again = engine.restarted()
        await again.start()
        proxy.stack.push_async_callback(again.stop)
    await until(lambda: _state_everywhere(doors, decode, "ready"))
    await until(lambda: _state_everywhere(doors, prefill, "ready"))
    for door in doors[:2]:
        status, body = await soon(door.ask())
        assert status == 200, (body, proxy.written)
        assert not (await door.instance(decode))["restart_wanted"]


async def test_an_engine_that_recovers_alone_is_back_for_all(fleet, engines) -> None:
    proxy = await fleet(2, **SOON)
    _, decode = pair = await engines(proxy.zmq)
    for engine in pair:
        await proxy.until_known(engine)
    doors = await proxy.doors()
    with decode.faults.held("forward"):
        assert (await soon(doors[0].ask()))[0] == 504
        await until(lambda: _state_everywhere(doors, decode, "frozen", restart=True))
    await until(lambda: _state_everywhere(doors, decode, "ready"))
    for door in doors:
        assert (await door.ask())[0] in (200, 503), "one of them tries it first"


async def test_a_stopped_decode_is_found_hung_by_all(fleet, engines) -> None:
    """Each worker finds the process hung; the prefill that blocks behind it is found by the one whose request waits."""
    proxy = await fleet(2, INSTANCE_EXPIRY="3", PROBE_INTERVAL="1", FREEZE_AFTER_MIN="3")
    (prefill, decode) = await engines(proxy.zmq)
    await decode.stop()
    stopped = await proxy.stack.enter_async_context(engine_process("decode", proxy.zmq))
    for engine in (prefill, stopped):
        await proxy.until_known(engine)
    doors = await proxy.doors()
    stopped.stop()
    status, body = await soon(doors[0].ask())
    assert (status, body["error"]["message"]) == (504, "The prefill instance is stalled.")
    await until(lambda: _state_everywhere(doors, prefill, "frozen", restart=True))
    await until(lambda: _state_everywhere(doors, stopped, "lost", restart=True))
    assert (await doors[1].instance(prefill))["freezes"] == 1
    await stopped.kill()
    await until(lambda: _state_everywhere(doors, stopped, "lost"))


async def _state_everywhere(doors, engine, state: str, restart: bool = False) -> bool:
    shown = [await door.instance(engine) for door in doors]
    return all((i["state"], i["restart_wanted"]) == (state, restart) for i in shown)
