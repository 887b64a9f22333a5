"""A worker that is killed, stopped or hangs: the others continue, and its load is released."""

from __future__ import annotations

import asyncio
import os
import signal

import aiohttp
import pytest

from tests.conftest import soon
from tests.workers.conftest import samples, until

ENDLESS = {"max_tokens": 3000, "ignore_eos": True}
ADMIN = {"Authorization": "Bearer sk-admin"}


async def test_a_worker_killed_in_mid_stream_is_replaced_and_its_load_is_released(fleet, engines) -> None:
    proxy = await fleet(2)
    _prefill, decode = pair = await engines(proxy.zmq, time_per_output_token=0.002)
    for engine in pair:
        await proxy.until_known(engine)
    doors = await proxy.doors()
    for door in doors:
        for _ in range(3):
            assert (await door.ask())[0] == 200
    watcher = await proxy.door()
    while watcher.worker != 1:
        watcher = await proxy.door()
    before = await watcher.get("/stats")
    counted = samples(await watcher.text("/metrics"))
    streams = [await doors[0].begin_stream(**ENDLESS), await doors[1].begin_stream(max_tokens=400, ignore_eos=True)]
    assert (await watcher.instance(decode))["in_flight"] == 2
    seen = len(proxy.lines)
    os.kill(before["workers"][0]["pid"], signal.SIGKILL)
    with pytest.raises(aiohttp.ClientError):
        await soon(streams[0].read())
    await proxy.until_written(r"Worker 0 has ended \(signal 9\) and is replaced", seen)
    stats = await watcher.get("/stats")
    by_address = {i["http_address"]: i for i in stats["instances"]}
    assert by_address[decode.http_address]["in_flight"] <= 1, "released at once"
    assert by_address[decode.http_address]["requests_total"] >= 6
    assert b"[DONE]" in await soon(streams[1].read()), "the other one's stream has not noticed"
    for engine in pair:
        await proxy.until_written(rf"worker 0 [^\n]*{engine.http_address} is ready", seen)
    await proxy.until_written("Worker 0 serves again", seen)
    again = await proxy.doors()
    for door in again:
        assert (await door.ask())[0] == 200
    stats = await again[0].get("/stats")
    assert [worker["restarts"] for worker in stats["workers"]] == [1, 0]
    assert stats["workers"][0]["pid"] != before["workers"][0]["pid"]
    assert all(worker["responding"] for worker in stats["workers"])
    assert [i["in_flight"] for i in stats["instances"]] == [0, 0]
    assert stats["requests"]["in_flight"] == 0 and stats["requests"]["outcomes"]["ok"] >= 9
    now = samples(await again[1].text("/metrics"))
    back = {name: (value, now.get(name)) for name, value in counted.items() if name.split("{")[0].endswith("_total")
            and name.startswith("disagg_proxy_") and now.get(name, -1) < value}  # fmt: skip
    assert not back
    assert now["disagg_proxy_worker_restarts_total"] == 1
    await soon(decode.wait_until(lambda state: not state["running"] and not state["kv_waiting"]))


async def test_capacity_of_a_killed_worker_goes_to_a_request_queued_in_another(fleet, engines) -> None:
    proxy = await fleet(2, DECODE_MAX_IN_FLIGHT="1")
    pair = await engines(proxy.zmq)
    for engine in pair:
        await proxy.until_known(engine)
    doors = await proxy.doors()
    pids = await proxy.pids()
    stream = await doors[0].begin_stream(**ENDLESS)
    waiting = asyncio.create_task(doors[1].ask())
    watcher = await proxy.door()
    await until(lambda: _queued(watcher, 1))
    os.kill(pids[0], signal.SIGKILL)
    assert (await soon(waiting))[0] == 200
    stream.close()


async def _queued(door, count: int) -> bool:
    return (await door.get("/stats"))["requests"]["queued"] == count


async def test_connections_that_a_dying_worker_has_not_accepted_are_served(fleet, engines) -> None:
    proxy = await fleet(2)
    for engine in await engines(proxy.zmq):
        await proxy.until_known(engine)
    pids = await proxy.pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    asked = [asyncio.create_task(proxy.door()) for _ in range(20)]
    await asyncio.sleep(0.05)
    os.kill(pids[0], signal.SIGKILL)
    doors = await soon(asyncio.gather(*asked))
    assert {door.worker for door in doors} == {0}
    os.kill(pids[1], signal.SIGCONT)


async def test_a_stopped_worker_delays_no_other(fleet, engines) -> None:
    proxy = await fleet(2, ADMIN_KEY="sk-admin")
    _prefill, decode = pair = await engines(proxy.zmq)
    for engine in pair:
        await proxy.until_known(engine)
    doors = await proxy.doors()
    assert (await doors[0].ask())[0] == 200
    pids = await proxy.pids()
    os.kill(pids[0], signal.SIGSTOP)
    try:
        more = await soon(asyncio.gather(*(proxy.door() for _ in range(8))))
        assert {door.worker for door in more} == {1}
        answers = await soon(asyncio.gather(*(door.ask() for door in more)))
        assert {status for status, _ in answers} == {200}
        await until(lambda: _responding(doors[1], [False, True]))
        stats = await doors[1].get("/stats")
        assert stats["requests"]["outcomes"]["ok"] == 9
        # What it is told meanwhile it does when it goes on.
        drained = f"/admin/drain?instance={decode.http_address}"
        status, report = await soon(doors[1].post(drained, **ADMIN))
        assert status == 200 and report["draining"]
        assert not report["idle"], "it has not heard, and would send something"
        late = (await engines(proxy.zmq))[1]
        await proxy.until_written(rf"worker 1 [^\n]*{late.http_address} is ready")
    finally:
        os.kill(pids[0], signal.SIGCONT)
    await until(lambda: _responding(doors[1], [True, True]))
    assert (await doors[0].instance(decode))["draining"]
    await proxy.until_written(rf"worker 0 [^\n]*{late.http_address} is ready")
    assert (await doors[0].ask())[0] == 200
    assert (await doors[0].instance(decode))["idle"]
    assert (await doors[0].instance(late))["requests_total"] == 1


async def _responding(door, expected: list[bool]) -> bool:
    return [worker["responding"] for worker in (await door.get("/stats"))["workers"]] == expected


async def test_a_new_worker_applies_earlier_drains_and_kv_transfers(fleet, engines) -> None:
    """A drain; and a prefill that has sent to a decode process which is gone, and must not meet the next one."""
    proxy = await fleet(2, ADMIN_KEY="sk-admin")
    prefill, decode = pair = await engines(proxy.zmq)
    other, spare = await engines(proxy.zmq)
    for engine in (*pair, other, spare):
        await proxy.until_known(engine)
    doors = await proxy.doors()
    for engine in (other, spare):
        assert (await doors[0].post(f"/admin/drain?instance={engine.http_address}", **ADMIN))[0] == 200
    assert (await doors[0].ask())[0] == 200
    seen = len(proxy.lines)
    await decode.kill()
    await proxy.until_gone(decode, seen)
    again = decode.restarted()
    await again.start()
    proxy.stack.push_async_callback(again.stop)
    await proxy.until_known(again, 2, seen)
    for door in doors:
        assert (await door.instance(prefill))["cannot_exchange_with"] == [decode.http_address], door.worker
    seen = len(proxy.lines)
    pids = await proxy.pids()
    os.kill(pids[1], signal.SIGKILL)
    await proxy.until_written(rf"worker 1 [^\n]*{again.http_address} is ready", seen)
    await proxy.until_written(rf"worker 1 [^\n]*{prefill.http_address} is ready", seen)
    await proxy.until_written("Worker 1 serves again", seen)
    fresh = (await proxy.doors())[1]
    assert (await fresh.instance(prefill))["cannot_exchange_with"] == [decode.http_address]
    assert (await fresh.instance(other))["draining"] and (await fresh.instance(spare))["draining"]
    status, body = await fresh.ask()
    assert status == 503 and "would freeze" in body["error"]["message"]
