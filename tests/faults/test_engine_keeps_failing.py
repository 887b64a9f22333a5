"""An instance that fails before it has accepted a request costs the client nothing while another one can serve."""

import asyncio

import pytest

from disagg_proxy.cluster.breaker import FAILURES_TO_OPEN
from disagg_proxy.cluster.instance import State
from disagg_proxy.sim import SimEngine, expected_text
from tests.conftest import soon
from tests.machine import Machine

COMPLETIONS = "/v1/completions"
ASK = {"prompt": "San Francisco is a", "max_tokens": 5}
RIGHT = expected_text(ASK["prompt"], 5)
in_turn = pytest.mark.settings(prefill_policy="round_robin", decode_policy="round_robin")
stubborn = pytest.mark.settings(prefill_policy="round_robin", decode_policy="round_robin", probe_interval=60.0)


async def served(machine: Machine, count: int = 4) -> None:
    for _ in range(count):
        status, _, body = await machine.post(COMPLETIONS, ASK)
        assert (status, body["choices"][0]["text"]) == (200, RIGHT)


def ids(engine: SimEngine) -> list[str]:
    return [request.headers["X-Request-Id"] for request in engine.received(COMPLETIONS)]


@in_turn
@pytest.mark.parametrize("how", ["5xx", "reset", "close"])
async def test_a_prefill_that_fails_is_replaced_with_a_new_id(machine, four, how: str) -> None:
    prefills, decodes = four
    bad = prefills[0].faults
    if how == "5xx":
        bad.fail_next(503, b"busy", path=COMPLETIONS)
    else:
        # Once more than the one repetition that a kept connection gets.
        (bad.reset_next if how == "reset" else bad.close_next)(path=COMPLETIONS, times=2)
    await served(machine)
    assert machine.proxy.services.stats.failovers == 1
    assert not set(ids(prefills[0])[:1]) & set(ids(prefills[1]))
    asked = [id for decode in decodes for id in ids(decode)]
    assert len(asked) == len(set(asked)) == 4
    for engine in (*prefills, *decodes):
        assert not engine.state()["kv_waiting"] and engine.state()["stalled_on"] is None


@stubborn
async def test_a_prefill_that_is_gone_is_replaced(unnoticed, machine, four) -> None:
    prefills, _ = four
    await prefills[0].kill()
    await served(machine)
    assert len(prefills[1].received(COMPLETIONS)) == 4


@stubborn
async def test_a_decode_that_is_gone_means_a_new_prefill_with_a_new_id(unnoticed, machine, four) -> None:
    prefills, decodes = four
    with prefills[0].faults.held("answer"), prefills[1].faults.held("answer"):
        request = asyncio.ensure_future(machine.post(COMPLETIONS, ASK))
        await soon(asyncio.wait([asyncio.ensure_future(p.wait_until(lambda s: s["held_at"])) for p in prefills],
                                return_when=asyncio.FIRST_COMPLETED))  # fmt: skip
        chosen = next(d for d in decodes if machine.proxy.instance(d.http_address).in_flight)
        await soon(chosen.wait_until(lambda s: s["kv_received"] == chosen.config.kv_layers))
        await chosen.kill()
    status, _, body = await soon(request)
    assert (status, body["choices"][0]["text"]) == (200, RIGHT)
    sent = [id for prefill in prefills for id in ids(prefill)]
    assert len(sent) == len(set(sent)) == 2


@in_turn
async def test_a_decode_that_failed_after_it_was_asked_is_not_replaced(machine, four) -> None:
    _, decodes = four
    decodes[0].faults.reset_next(path=COMPLETIONS)
    status, _, body = await machine.post(COMPLETIONS, ASK)
    assert (status, body["error"]["code"]) == (502, "engine_disconnected")
    assert not decodes[1].received(COMPLETIONS)


@in_turn
async def test_a_clients_own_mistake_is_neither_retried_nor_held_against_anyone(machine, four) -> None:
    prefills, decodes = four
    for _ in range(2 * FAILURES_TO_OPEN + 2):
        status, _, _ = await machine.post(COMPLETIONS, {**ASK, "temperature": -1})
        assert status == 400
    assert sum(len(prefill.received(COMPLETIONS)) for prefill in prefills) == 2 * FAILURES_TO_OPEN + 2
    _, stats = await machine.get("/stats")
    assert {(i["breaker"], i["failures_total"]) for i in stats["instances"]} == {("closed", 0)}


@in_turn
async def test_tries_are_bounded(machine, four) -> None:
    prefills, _ = four
    for prefill in prefills:
        prefill.faults.fail_next(500, b"", path=COMPLETIONS, times=9)
    status, _, body = await machine.post(COMPLETIONS, ASK)
    assert (status, body["error"]["code"]) == (502, "engine_failed")
    assert [len(prefill.received(COMPLETIONS)) for prefill in prefills] == [1, 1]


@pytest.mark.settings(max_tries=1)
async def test_one_try_means_one_pair(machine, four) -> None:
    prefills, _ = four
    for prefill in prefills:
        prefill.faults.fail_next(500, b"", path=COMPLETIONS)
    status, _, _ = await machine.post(COMPLETIONS, ASK)
    assert status == 502 and sum(len(prefill.received(COMPLETIONS)) for prefill in prefills) == 1


@in_turn
async def test_a_client_that_left_is_not_tried_for(machine, four) -> None:
    prefills, _ = four
    for prefill in prefills:
        prefill.faults.hold("answer")
    request = asyncio.ensure_future(machine.post(COMPLETIONS, ASK))
    await soon(prefills[0].wait_until(lambda s: s["held_at"] == "answer"))
    request.cancel()
    await soon(machine.proxy.until_clients(0))
    await prefills[0].kill()
    await soon(machine.proxy.until_quiet())
    assert not prefills[1].received(COMPLETIONS)


@in_turn
async def test_a_prefill_that_keeps_failing_is_left_alone(machine, four) -> None:
    prefills, _ = four
    prefills[0].faults.fail_next(503, b"", path=COMPLETIONS, times=100)
    await served(machine, 3 * FAILURES_TO_OPEN)
    assert len(prefills[0].received(COMPLETIONS)) == FAILURES_TO_OPEN
    _, stats = await machine.get("/stats")
    assert [i["breaker"] for i in stats["instances"]] == ["open", "closed", "closed", "closed"]


async def test_a_pair_that_is_left_alone_is_503_with_the_reason(machine, pair) -> None:
    pair[0].faults.fail_next(503, b"", path=COMPLETIONS, times=100)
    for _ in range(FAILURES_TO_OPEN):
        status, _, _ = await machine.post(COMPLETIONS, ASK)
        assert status == 502
    status, headers, body = await machine.post(COMPLETIONS, ASK)
    assert status == 503 and "every prefill instance has kept failing" in body["error"]["message"]
    assert int(headers["Retry-After"]) >= 1


async def test_500s_that_a_client_may_have_caused_leave_nobody_alone(machine, pair) -> None:
    pair[0].faults.fail_next(500, b"TypeError", path=COMPLETIONS, times=3 * FAILURES_TO_OPEN)
    for _ in range(3 * FAILURES_TO_OPEN):
        status, _, _ = await machine.post(COMPLETIONS, ASK)
        assert status == 502
    await served(machine, 1)


async def test_a_dead_engine_is_out_after_its_first_500(machine, pair) -> None:
    pair[0].faults.health_status = 503
    pair[0].faults.fail_next(500, b"EngineDeadError", path=COMPLETIONS)
    status, _, _ = await machine.post(COMPLETIONS, ASK)
    assert status in (502, 503)
    await soon(machine.proxy.until_state(pair[0].http_address, State.PROBING))


async def test_streams_that_a_death_cuts_keep_nobody_from_the_next_process(machine, pair) -> None:
    _, decode = pair
    decode.faults.hold("answer", after=2)
    streams = [
        asyncio.ensure_future(machine.http.post(machine.proxy.url + COMPLETIONS, json={**ASK, "stream": True}))
        for _ in range(3 * FAILURES_TO_OPEN)
    ]
    answers = await soon(asyncio.gather(*streams))
    spare = await machine.engine("prefill")
    await soon(machine.proxy.until_state(spare.http_address, State.READY))
    await decode.kill()
    for answer in answers:
        answer.close()
    await soon(machine.proxy.until_state(decode.http_address, State.PROBING))
    again = decode.restarted()
    await again.start()
    try:
        await soon(machine.proxy.until_state(decode.http_address, State.READY))
        await served(machine, 1)
    finally:
        await again.stop()
