"""What must hold for the proxy as a whole, whichever worker serves a request."""

from __future__ import annotations

import asyncio
import random

import pytest

from disagg_sim import expected_text
from tests.conftest import soon
from tests.workers.conftest import ASK, PATH, Door, samples

RIGHT = expected_text(ASK["prompt"], 8)


class Most:
    """The most that was ever at once at an engine."""

    def __init__(self, engine, what) -> None:
        self.reached = 0
        self._what = what
        self._task = asyncio.create_task(engine.wait_until(self._look))

    def _look(self, state) -> bool:
        self.reached = max(self.reached, self._what(state))
        return False

    async def end(self) -> int:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        return self.reached


def requests_at(state) -> int:
    return state["running"] + state["waiting"]


async def test_every_worker_knows_every_instance_and_serves(fleet, engines) -> None:
    proxy = await fleet(3)
    pair = await engines(proxy.zmq)
    for engine in pair:
        await proxy.until_known(engine, 3)
    for door in await proxy.doors(3):
        health = await door.get("/health")
        assert (health["status"], health["pairs"]) == ("ok", 1)
        status, body = await door.ask()
        assert (status, body["choices"][0]["text"]) == (200, RIGHT)


async def test_static_instances_are_shared_too(fleet, engines) -> None:
    prefill, decode = await engines(None)
    named = {
        "PREFILL_INSTANCES": f"http://{prefill.http_address},{prefill.kv_address}",
        "DECODE_INSTANCES": f"http://{decode.http_address},{decode.kv_address}",
    }
    proxy = await fleet(2, DECODE_MAX_IN_FLIGHT="1", **named)
    doors = await proxy.doors()
    stream = await doors[0].begin_stream(max_tokens=3000, ignore_eos=True)
    assert (await doors[1].instance(decode))["in_flight"] == 1
    waiting = asyncio.create_task(doors[1].ask())
    third = await proxy.door()
    while not (await third.get("/stats"))["requests"]["queued"]:
        await asyncio.sleep(0.01)
    stream.close()
    assert (await soon(waiting))[0] == 200


@pytest.mark.parametrize(
    ("settings", "knobs"),
    [
        ({"DECODE_MAX_IN_FLIGHT": "3"}, {}),
        ({"MAX_IN_FLIGHT": "3"}, {}),
        ({"PREFILL_MAX_IN_FLIGHT": "3"}, {"prefill_tokens_per_second": 2000}),
    ],
    ids=["of each decode", "in all", "of each prefill"],
)
async def test_limits_hold_over_all_workers_in_a_burst(fleet, engines, settings, knobs) -> None:
    proxy = await fleet(3, **settings)
    prefill, decode = await engines(proxy.zmq, **knobs)
    for engine in (prefill, decode):
        await proxy.until_known(engine, 3)
    doors = [door for _ in range(8) for door in await proxy.doors(3)]
    limited = prefill if "PREFILL_MAX_IN_FLIGHT" in settings else decode
    most = Most(limited, requests_at)
    answers = await soon(asyncio.gather(*(door.ask() for door in doors for _ in range(4))))
    assert {status for status, _ in answers} == {200}
    assert {body["choices"][0]["text"] for _, body in answers} == {RIGHT}
    assert 2 <= await most.end() <= 3
    served = {door.worker for door in doors}
    assert served == {0, 1, 2}
    stats = await doors[0].get("/stats")
    assert stats["requests"]["outcomes"] == {"ok": 96} and stats["requests"]["queued"] == 0
    assert stats["latency"]["total"]["count"] == 96
    assert [i["in_flight"] for i in stats["instances"]] == [0, 0]


async def test_the_kv_buffer_never_overflows(fleet, engines) -> None:
    """Eight prompts of 100 tokens fit into the buffer; many more are asked at once."""
    per_token = 1000
    proxy = await fleet(2, KV_BUFFER_BYTES=str(800 * per_token), KV_BYTES_PER_TOKEN=str(per_token))
    knobs = {"kv_bytes_per_token": per_token, "kv_buffer_bytes": 800 * per_token, "kv_pool_bytes": per_token}
    prefill, decode = await engines(proxy.zmq, **knobs)
    for engine in (prefill, decode):
        await proxy.until_known(engine)
    doors = [door for _ in range(10) for door in await proxy.doors()]
    most = Most(decode, lambda state: state["kv_buffer_used"])
    answers = await soon(asyncio.gather(*(door.ask(prompt=[7] * 100) for door in doors for _ in range(3))))
    assert {status for status, _ in answers} == {200}
    assert 100 * per_token < await most.end() <= 800 * per_token
    assert decode.state()["listener"] == "alive" and decode.state()["dead"] is None


async def test_bursts_over_three_workers_never_overflow_a_buffer_of_two_longest_prompts(fleet, engines) -> None:
    """Without any setting: random lengths, streamed or not, and a third of the clients leaves."""
    longest, per_token = 400, 1000
    proxy = await fleet(3)
    knobs = {
        "max_model_len": longest, "kv_bytes_per_token": per_token, "kv_buffer_bytes": 2 * longest * per_token,
        "kv_pool_bytes": 1, "max_num_seqs": 4, "prefill_tokens_per_second": 40_000.0, "time_per_output_token": 0.002,
    }  # fmt: skip
    prefill, decode = await engines(proxy.zmq, **knobs)
    for engine in (prefill, decode):
        await proxy.until_known(engine, workers=3)
    doors = [door for _ in range(10) for door in await proxy.doors(3)]
    assert {door.worker for door in doors} == {0, 1, 2}
    for seed in range(2):
        chance = random.Random(seed)

        async def one(door: Door, chance: random.Random = chance) -> int | None:
            tokens, output = chance.randrange(2, longest - 10), chance.randrange(1, 10)
            prompt = [5 + chance.randrange(100)] * tokens
            if chance.random() < 0.5:
                prompt = "x7" * (tokens // 2)
            stays = 30.0 if chance.random() < 0.67 else chance.uniform(0, 0.3)
            request = door.session.post(
                f"{proxy.url}{PATH}",
                json={**ASK, "prompt": prompt, "max_tokens": output, "stream": chance.random() < 0.5},
            )
            try:
                answer = await asyncio.wait_for(request, stays)
                await asyncio.wait_for(answer.read(), stays)
                return answer.status
            except asyncio.TimeoutError:
                return None

        found = await soon(asyncio.gather(*map(one, doors)))
        assert set(found) <= {200, None} and found.count(200) > len(found) / 3
        assert decode.state()["listener"] == "alive" and decode.state()["dead"] is None
    await soon(decode.wait_until(lambda state: not state["kv_waiting"] and not state["kv_buffer_used"]))


async def test_the_queue_is_as_long_as_allowed_over_all_workers(fleet, engines) -> None:
    proxy = await fleet(2, DECODE_MAX_IN_FLIGHT="1", MAX_QUEUE="3")
    prefill, decode = await engines(proxy.zmq)
    for engine in (prefill, decode):
        await proxy.until_known(engine)
    doors = [door for _ in range(5) for door in await proxy.doors()]
    decode.faults.hold("schedule")
    answers = [asyncio.create_task(door.ask()) for door in doors]
    refused = 0
    while refused < 6:
        done, _ = await soon(asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED))
        assert all(task.result()[0] == 429 for task in done)
        answers = [task for task in answers if task not in done]
        refused += len(done)
    stats = await (await proxy.door()).get("/stats")
    assert stats["requests"]["queued"] <= 3 and stats["requests"]["turned_away"] == refused
    decode.faults.release()
    assert {status for status, _ in await soon(asyncio.gather(*answers))} == {200}


async def test_queues_of_several_workers_take_turns(fleet, engines) -> None:
    proxy = await fleet(2, DECODE_MAX_IN_FLIGHT="1")
    prefill, decode = await engines(proxy.zmq)
    for engine in (prefill, decode):
        await proxy.until_known(engine)
    doors = await proxy.doors()
    watcher = await proxy.door()
    first = await doors[0].begin_stream(max_tokens=3000, ignore_eos=True)
    order: list[int] = []
    asked = []

    async def ask(number: int, door) -> None:
        assert (await door.ask(prompt=[number + 5] * 3))[0] == 200
        order.append(number)

    more = [*await proxy.doors(), *await proxy.doors()]
    for number, door in enumerate((more[1], more[0], more[3], more[2])):
        asked.append(asyncio.create_task(ask(number, door)))
        while (await watcher.get("/stats"))["requests"]["queued"] != number + 1:
            await asyncio.sleep(0.01)
    first.close()
    await soon(asyncio.gather(*asked))
    assert sorted(order) == [0, 1, 2, 3] and order != [3, 2, 1, 0]


async def test_stats_and_metrics_are_complete_from_any_worker(fleet, engines) -> None:
    proxy = await fleet(2)
    pair = await engines(proxy.zmq)
    for engine in pair:
        await proxy.until_known(engine)
    doors = await proxy.doors()
    for count, door in zip((2, 3), doors, strict=True):
        for _ in range(count):
            assert (await door.ask())[0] == 200
    for door in doors:
        stats = await door.get("/stats")
        assert stats["answered_by"] == door.worker
        assert stats["requests"]["outcomes"] == {"ok": 5} and stats["latency"]["prefill"]["count"] == 5
        assert [i["requests_total"] for i in stats["instances"]] == [5, 5]
        assert [(w["worker"], w["restarts"], w["responding"]) for w in stats["workers"]] == [
            (0, 0, True),
            (1, 0, True),
        ]
        assert sum(w["connections"] for w in stats["workers"]) >= 2
        assert stats["discovery"]["messages"] >= 2
        metrics = samples(await door.text("/metrics"))
        assert sum(v for k, v in metrics.items() if "requests_total{" in k and 'outcome="ok"' in k) == 5
        where = f'{{address="{pair[0].http_address}",role="prefill"}}'
        assert metrics[f"disagg_proxy_instance_requests_total{where}"] == 5
        assert metrics["disagg_proxy_workers"] == 2 and metrics["disagg_proxy_worker_restarts_total"] == 0


async def test_a_drain_through_one_worker_acts_on_all(fleet, engines) -> None:
    proxy = await fleet(2, ADMIN_KEY="sk-admin")
    prefill, decode = await engines(proxy.zmq)
    for engine in (prefill, decode):
        await proxy.until_known(engine)
    doors = await proxy.doors()
    key = {"Authorization": "Bearer sk-admin"}
    stream = await doors[1].begin_stream(max_tokens=3000, ignore_eos=True)
    status, report = await doors[0].post(f"/admin/drain?instance={decode.http_address}", **key)
    assert status == 200 and report["draining"] and not report["idle"] and report["in_flight"] == 1
    for door in [doors[0], await proxy.door(), await proxy.door()]:
        assert (await door.instance(decode))["draining"]
        status, body = await door.ask()
        assert status == 503 and "maintenance" in body["error"]["message"]
    wait = asyncio.create_task(doors[0].post(f"/admin/drain?instance={decode.http_address}&wait=20", **key))
    stream.close()
    status, report = await soon(wait)
    assert report["idle"] and report["in_flight"] == 0
    again = await proxy.doors()
    assert (await again[1].post(f"/admin/undrain?instance={decode.http_address}", **key))[0] == 200
    for door in again:
        assert (await door.ask())[0] == 200
        assert not (await door.instance(decode))["draining"]


async def test_clients_are_spread_evenly(fleet) -> None:
    proxy = await fleet(3)
    doors = await asyncio.gather(*(proxy.door() for _ in range(30)))
    stats = await doors[0].get("/stats")
    counts = sorted(worker["connections"] for worker in stats["workers"])
    assert sum(counts) == 30 and counts[-1] - counts[0] <= 6, counts
