"""The page shows the complete proxy from any worker, and keeps what a dead worker has published."""

from __future__ import annotations

import json
import os
import signal

from tests.conftest import soon
from tests.workers.conftest import Door, until


async def view(door: Door) -> dict:
    """The view that a page gets first."""
    async with door.session.get(door._url + "/dashboard/events") as answer:
        while line := await soon(answer.content.readline()):
            if line.startswith(b"data:"):
                answer.close()
                return json.loads(line[5:])
    raise AssertionError("no view")


async def test_requests_and_events_of_all_workers_are_in_the_view_of_each(fleet, engines) -> None:
    proxy = await fleet(2)
    _prefill, _decode = pair = await engines(proxy.zmq)
    for engine in pair:
        await proxy.until_known(engine)
    doors = await proxy.doors()
    for door, count in zip(doors, (2, 3), strict=True):
        for number in range(count):
            body = {"model": "sim-model", "prompt": "x", "max_tokens": 30, "stream": True}
            headers = {"X-Request-Id": f"{door.worker}-{number}"}
            async with door.session.post(door._url + "/v1/completions", json=body, headers=headers) as answer:
                assert b"[DONE]" in await answer.read()
    for door in await proxy.doors():
        whole = await view(door)
        assert {r["client_id"] for r in whole["recent"]} == {"0-0", "0-1", "1-0", "1-1", "1-2"}
        seqs = [r["seq"] for r in whole["recent"]]
        assert seqs == sorted(seqs)
        assert whole["totals"]["requests"] == {"ok": 5} and whole["workers"] == 2
        (flow,) = whole["flows"]
        assert (flow["in_flight"], flow["total"]) == (0, 5)
        assert [(e["kind"], e["instance"]) for e in whole["events"]] == [
            ("admitted", engine.http_address)
            for engine in sorted(pair, key=lambda one: [e["instance"] for e in whole["events"]].index(one.http_address))
        ], "each once"
        steps = [step for step in whole["rates"]["steps"] if step["requests"] is not None]
        assert sum(step["requests"].get("ok", 0) for step in steps) == 5
        assert sum(step["pieces"] for step in steps) == sum(r["pieces"] for r in whole["recent"]) > 5


async def test_a_replacement_keeps_what_a_dead_worker_published(fleet, engines) -> None:
    proxy = await fleet(2)
    pair = await engines(proxy.zmq)
    for engine in pair:
        await proxy.until_known(engine)
    doors = await proxy.doors()
    assert (await doors[0].ask())[0] == (await doors[1].ask())[0] == 200
    assert len((await view(doors[1]))["recent"]) == 2, "published because it was asked for"
    seen = len(proxy.lines)
    pids = await proxy.pids()
    os.kill(pids[0], signal.SIGKILL)
    await proxy.until_written("Worker 0 serves again", seen)
    again = await proxy.doors()
    assert (await again[0].ask())[0] == 200

    async def told() -> bool:
        return len((await view(again[1]))["recent"]) == 3

    await until(told)
    whole = await view(again[1])
    kinds = [e["kind"] for e in whole["events"]]
    assert kinds.count("admitted") == 2 and kinds[-1] == "worker_replaced", kinds
    assert whole["flows"][0]["total"] == 3 and whole["totals"]["requests"] == {"ok": 3}


async def test_every_worker_shows_the_load_that_one_of_them_reads(fleet, engines) -> None:
    proxy = await fleet(2)
    pair = await engines(proxy.zmq)
    for engine in pair:
        await proxy.until_known(engine)
    viewer = (await proxy.doors())[1]
    for door in await proxy.doors():

        async def shown(door: Door = door) -> bool:
            await view(viewer)
            return all((i["engine_load"] or {}).get("running") == 0 for i in (await door.get("/stats"))["instances"])

        await until(shown)
