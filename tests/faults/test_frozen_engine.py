"""An engine that is stalled although it pings and answers /health: noticed, recovered or taken out, and named."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from disagg_proxy.cluster.instance import State
from tests.conftest import soon
from tests.simulated import REQUESTS, RIGHT, check_error, text_of, text_of_events

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
SOON = pytest.mark.settings(freeze_after_min=0.4, freeze_after_max=0.4, probe_interval=0.1)
FOREIGN = "___prefill_addr_127.0.0.1:9___decode_addr_{}_0123"
"""An id that nobody has prefilled; this proxy has never seen it."""


async def instance_of(machine, engine) -> dict:
    _, stats = await machine.get("/stats")
    return next(i for i in stats["instances"] if i["http_address"] == engine.http_address)


async def stuck_for_ever(machine, decode) -> asyncio.Task:
    """Make a decode wait for KV that nobody can send."""
    headers = {"X-Request-Id": FOREIGN.format(decode.kv_address)}

    async def ask() -> None:
        async with machine.http.post(f"http://{decode.http_address}{PATH}", json=ASK, headers=headers) as answer:
            await answer.read()

    task = asyncio.ensure_future(ask())
    await soon(decode.wait_until(lambda state: state["stalled_on"] is not None))
    return task


@SOON
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("lost", [1, 3])
async def test_a_decode_that_waits_for_lost_kv_is_freed_by_replays(machine, pair, lost: int, stream: bool) -> None:
    prefill, decode = pair
    decode.faults.lose_kv(lost)
    path = "/v1/chat/completions"
    body = {**REQUESTS[path], "max_tokens": 8}
    if stream:
        await soon(asyncio.gather(*(machine.stream(path, body) for _ in range(5))))
    else:
        answers = await soon(asyncio.gather(*(machine.post(path, body) for _ in range(5))))
        assert [(status, text_of(answer)) for status, _, answer in answers] == [(200, RIGHT[path])] * 5
    await soon(machine.proxy.until_state(decode.http_address, State.READY))
    shown = await instance_of(machine, decode)
    assert shown["freezes"] == 1 and shown["replays"] >= lost and not shown["restart_wanted"]
    replayed = [r.headers["X-Request-Id"] for r in prefill.received(path)]
    assert len(replayed) - len(set(replayed)) == shown["replays"], "each replay has the id of its prefill"
    assert len({r.headers["X-Request-Id"] for r in decode.received(path)}) == len(decode.received(path))
    await machine.unharmed(*pair)


@SOON
async def test_the_kv_of_a_request_whose_client_has_left_is_replayed_too(machine, pair, dial) -> None:
    _, decode = pair
    decode.faults.lose_kv()
    client = await dial(machine.proxy.url)
    client.post(PATH, {**ASK, "prompt": "gone"})
    await soon(decode.wait_until(lambda state: state["stalled_on"] is not None))
    await machine.left(client)
    await soon(machine.proxy.until_idle())
    await soon(machine.proxy.until_state(decode.http_address, State.READY))
    status, _, body = await soon(machine.post(PATH, ASK))
    assert (status, text_of(body)) == (200, RIGHT[PATH])
    assert (await instance_of(machine, decode))["replays"] == 1
    await machine.unharmed(*pair)


@SOON
async def test_a_decode_that_no_replay_frees_is_taken_out_and_its_requests_get_504(machine, pair) -> None:
    prefill, decode = pair
    decode.faults.hold("schedule", after=3)
    async with machine.http.post(machine.proxy.url + PATH, json={**ASK, "stream": True}) as stream:
        await soon(stream.content.readany())
        await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
        foreign = asyncio.ensure_future(stuck_for_ever(machine, decode))
        await soon(decode.wait_until(lambda state: state["waiting"] == 1))
        waiting = asyncio.ensure_future(machine.send(PATH, {**ASK, "prompt": "another"}))
        await soon(decode.wait_until(lambda state: state["waiting"] == 2))
        decode.faults.release()
        task = await soon(foreign)
        message = check_error(*await soon(waiting), 504, "engine_frozen")
        assert message == "The decode instance is stalled."
        with pytest.raises(aiohttp.ClientError):
            await soon(stream.read())
    shown = await instance_of(machine, decode)
    assert (shown["state"], shown["restart_wanted"], shown["freezes"]) == ("frozen", True, 1)
    assert "stalled" in shown["reason"] and "did not help" in shown["reason"]
    status, _, body = await machine.post(PATH, ASK)
    assert status == 503 and "stalled" in body["error"]["message"]
    assert "127.0.0.1" not in body["error"]["message"]
    # As the supervisor restarts them: both, since the prefill knows the old decode.
    await decode.kill()
    await prefill.kill()
    await asyncio.gather(task, return_exceptions=True)
    for engine in (decode, prefill):
        again = engine.restarted()
        await again.start()
        machine.engines.append(again)
    for engine in (decode, prefill):
        await soon(machine.proxy.until_state(engine.http_address, State.READY))
    status, _, body = await machine.post(PATH, ASK)
    assert (status, text_of(body)) == (200, RIGHT[PATH])
    assert not (await instance_of(machine, decode))["restart_wanted"]


@SOON
async def test_a_decode_that_comes_round_by_itself_is_back(machine, pair) -> None:
    _, decode = pair
    with decode.faults.held("forward"):
        check_error(*await soon(machine.send(PATH, ASK)), 504, "engine_frozen")
        await soon(machine.proxy.until_state(decode.http_address, State.FROZEN))
    await soon(machine.proxy.until_state(decode.http_address, State.READY))
    await soon(machine.proxy.until_idle())
    await machine.unharmed(*pair)


async def ask_for(machine, stream: bool) -> str:
    """The text of the answer to the plain request."""
    if stream:
        return text_of_events(await machine.stream(PATH, ASK))
    status, _, body = await machine.post(PATH, ASK)
    assert status == 200, body
    return text_of(body)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_what_still_prefills_for_a_frozen_decode_goes_to_another(machine, pair, stream: bool) -> None:
    prefill, decode = pair
    registry = machine.proxy.services.registry
    with prefill.faults.held("answer"):
        asked = asyncio.ensure_future(ask_for(machine, stream))
        await soon(prefill.wait_until(lambda state: state["held_at"] == "answer"))
        registry.freeze(machine.proxy.instance(decode.http_address), "is stalled")
        spare = await machine.engine("decode")
        await soon(machine.proxy.until_state(spare.http_address, State.READY))
    assert await soon(asked) == RIGHT[PATH]
    first, second = (r.headers["X-Request-Id"] for r in prefill.received(PATH))
    assert first != second and [r.headers["X-Request-Id"] for r in spare.received(PATH)] == [second]
    drains = machine.proxy.services.stats.kv_releases
    assert (drains.waiting, len(decode.received(PATH))) == (1, 0), "until it moves, or its process ends"
    registry.unfreeze(machine.proxy.instance(decode.http_address), "moves")
    await soon(machine.proxy.until_idle())
    assert [r.headers["X-Request-Id"] for r in decode.received(PATH)] == [first] and drains.done == 1
    await machine.unharmed(prefill, decode, spare)


@SOON
async def test_kv_that_is_released_after_another_try_has_answered_can_be_replayed(machine, pair) -> None:
    """The first KV is lost, so its release stalls decode; the prefill is repeated although the bodies were dropped."""
    prefill, decode = pair
    decode.faults.lose_kv()
    registry = machine.proxy.services.registry
    with prefill.faults.held("answer"):
        asked = asyncio.ensure_future(ask_for(machine, stream=True))
        await soon(prefill.wait_until(lambda state: state["held_at"] == "answer"))
        registry.freeze(machine.proxy.instance(decode.http_address), "stalled")
        spare = await machine.engine("decode")
        await soon(machine.proxy.until_state(spare.http_address, State.READY))
    assert await soon(asked) == RIGHT[PATH]
    registry.unfreeze(machine.proxy.instance(decode.http_address), "moves")
    await soon(machine.proxy.until_state(decode.http_address, State.FROZEN))
    await soon(machine.proxy.until_state(decode.http_address, State.READY))
    shown = await instance_of(machine, decode)
    assert (shown["replays"], shown["restart_wanted"]) == (1, False)
    await machine.unharmed(prefill, decode, spare)


@SOON
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_requests_leave_a_frozen_prefill_and_what_it_sends_later_is_drained(machine, pair, stream: bool) -> None:
    prefill, decode = pair
    with prefill.faults.held("forward"):
        asked = asyncio.ensure_future(ask_for(machine, stream))
        await soon(prefill.wait_until(lambda state: state["held_at"] == "forward"))
        spare = await machine.engine("prefill")
        assert await soon(asked) == RIGHT[PATH]
        (first,), (second,) = prefill.received(PATH), spare.received(PATH)
        assert first.headers["X-Request-Id"] != second.headers["X-Request-Id"]
        assert [r.headers["X-Request-Id"] for r in decode.received(PATH)] == [second.headers["X-Request-Id"]]
        shown = await instance_of(machine, prefill)
        assert (shown["state"], shown["restart_wanted"], shown["in_flight"]) == ("frozen", True, 1)
    await soon(machine.proxy.until_idle())
    assert machine.proxy.services.stats.kv_releases.done == 1, (
        "the old prefill was not cancelled, and did its work in the end"
    )
    await soon(machine.proxy.until_state(prefill.http_address, State.READY))
    await machine.unharmed(prefill, spare, decode)


@SOON
async def test_without_another_prefill_the_client_gets_504(machine, pair) -> None:
    prefill, decode = pair
    with prefill.faults.held("forward"):
        message = check_error(*await soon(machine.send(PATH, ASK)), 504, "engine_frozen")
        assert message == "The prefill instance is stalled."
    await soon(machine.proxy.until_idle())
    assert machine.proxy.services.stats.kv_releases.done == 1
    assert machine.proxy.services.stats.outcomes == {"deadline": 1}
    await machine.unharmed(prefill, decode)


@SOON
async def test_a_decode_whose_kv_listener_is_dead_is_found_by_the_prefills_that_freeze(machine) -> None:
    knobs = {"kv_bytes_per_token": 1000, "kv_buffer_bytes": 1000, "kv_pool_bytes": 512}
    prefill, decode = await machine.pair(**knobs)
    other = await machine.engine("prefill", **knobs)
    await soon(machine.proxy.until_state(other.http_address, State.READY))
    answers = await soon(asyncio.gather(*(machine.send(PATH, {**ASK, "prompt": [7] * 900}) for _ in range(6))))
    assert decode.state()["listener"] != "alive"
    assert {status for status, _, _ in answers} <= {503, 504}
    await soon(machine.proxy.until_state(decode.http_address, State.FROZEN))
    shown = await instance_of(machine, decode)
    assert shown["restart_wanted"] and "receives no KV" in shown["reason"]
    assert prefill is not other


@SOON
async def test_a_long_answer_that_is_not_streamed_is_no_silence(machine) -> None:
    _, decode = await machine.pair(time_per_output_token=0.02)
    body = {**ASK, "max_tokens": 60, "ignore_eos": True}
    assert (await soon(machine.post(PATH, body)))[0] == 200, "its counters moved all the time"
    assert (await instance_of(machine, decode))["freezes"] == 0


@SOON
async def test_a_client_that_does_not_read_is_no_silence_of_decode(machine, pair, dial) -> None:
    _, decode = pair
    client = await dial(machine.proxy.url)
    client.reader._transport.pause_reading()
    client.post(PATH, {**ASK, "max_tokens": 30_000, "ignore_eos": True, "stream": True})
    await soon(decode.wait_until(lambda state: state["steps"] > 2000))
    await asyncio.sleep(1.0)
    assert (await instance_of(machine, decode))["freezes"] == 0
    client.leave()
    await soon(machine.proxy.until_idle())


@SOON
async def test_metrics_tell_of_it(machine, pair) -> None:
    decode = pair[1]
    decode.faults.lose_kv()
    assert (await soon(machine.post(PATH, ASK)))[0] == 200
    async with machine.http.get(machine.proxy.url + "/metrics") as answer:
        text = await answer.text()
    where = f'address="{decode.http_address}",role="decode"'
    lines = [line.replace(" ", "") for line in text.splitlines()]
    for name in ("freezes", "replays"):
        assert any(line.startswith(f"disagg_proxy_instance_{name}_total") and line.endswith("1.0") for line in lines), (
            where
        )


@pytest.mark.settings(freeze_after_min=0.4, freeze_after_max=0.4, probe_interval=0.1, max_tries=1)
@pytest.mark.parametrize("connector", ["p2p_nccl", "disagg_kv"])
async def test_an_idle_decode_that_was_given_up_and_moves_again_serves(machine, connector: str) -> None:
    engines = await machine.pair(connector=connector)
    with engines[1].faults.held("schedule"):
        check_error(*await soon(machine.send(PATH, {**ASK, "stream": True})), 504, "engine_frozen")
        await soon(machine.proxy.until_idle())
        await asyncio.sleep(1.0)
        assert (await instance_of(machine, engines[1]))["restart_wanted"], "a request without an answer proves nothing"
    await soon(machine.proxy.until_state(engines[1].http_address, State.READY))
    assert not (await instance_of(machine, engines[1]))["restart_wanted"]
    # Half-open: one request decides.
    instance = machine.proxy.instance(engines[1].http_address)
    assert not instance.breaker.healthy
    instance.breaker.record_success()
    await machine.check_right()
    await soon(machine.proxy.until_idle())
    await machine.unharmed(*engines)
