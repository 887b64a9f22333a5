"""The table "Hazards, and what recovers them": every row happens, and what recovers it does."""

from __future__ import annotations

import asyncio

import pytest

from disagg_sim import expected_text

from .pair import COMPLETIONS, Pair, cancelled, running

BODY = {"prompt": "tell me about the sea", "max_tokens": 6}
RIGHT = expected_text("tell me about the sea", 6)


async def never_asked(pair: Pair, request_id: str) -> None:
    """Nobody told P."""


async def refused(pair: Pair, request_id: str) -> None:
    answer = await pair.prefill(COMPLETIONS, BODY, request_id, min_tokens=2)
    assert answer.status == 400


async def failed(pair: Pair, request_id: str) -> None:
    pair.p.faults.fail_next(503, '{"error":{"message":"out of order"}}', path=COMPLETIONS)
    assert (await pair.prefill(COMPLETIONS, BODY, request_id)).status == 503


async def aborted_before_it_ran(pair: Pair, request_id: str) -> None:
    with pair.p.faults.held("schedule"):
        leg = asyncio.create_task(pair.prefill(COMPLETIONS, BODY, request_id))
        await pair.p.wait_until(lambda s: s["held_at"] == "schedule")
        await cancelled(leg)
        await pair.p.wait_until(lambda s: s["aborting"] == 1)
    state = await pair.p.wait_until(lambda s: s["aborted"] == 1)
    assert state["kv_sent"] == 0


@pytest.mark.parametrize("cause", [never_asked, refused, failed, aborted_before_it_ran])
async def test_kv_that_never_comes_hangs_all_of_decode_until_the_prefill_is_replayed(pair: Pair, cause) -> None:
    request_id = pair.new_id()
    await cause(pair, request_id)
    victim = asyncio.create_task(pair.post(pair.d, COMPLETIONS, BODY, request_id))
    other = await pair.assert_hangs(pair.d, f"cmpl-{request_id}-0")

    assert (await pair.prefill(COMPLETIONS, BODY, request_id)).status == 200

    assert (await victim).json["choices"][0]["text"] == RIGHT
    assert (await other).status == 200
    assert pair.d.state()["stalled_on"] is None


async def test_a_stream_that_hangs_has_already_answered_200(pair: Pair) -> None:
    request_id = pair.new_id()
    url = f"http://{pair.d.http_address}{COMPLETIONS}"
    async with pair.http.post(url, json={**BODY, "stream": True}, headers={"X-Request-Id": request_id}) as response:
        assert response.status == 200
        await pair.d.wait_until(lambda s: s["stalled_on"] is not None)
        await pair.prefill(COMPLETIONS, BODY, request_id)
        assert "[DONE]" in await response.text()


async def test_a_client_that_leaves_does_not_end_the_hang(pair: Pair) -> None:
    request_id = pair.new_id()
    victim = asyncio.create_task(pair.post(pair.d, COMPLETIONS, BODY, request_id))
    await pair.d.wait_until(lambda s: s["stalled_on"] is not None)
    await cancelled(victim)
    await pair.d.wait_until(lambda s: s["aborting"] == 1)
    other = await pair.assert_hangs(pair.d, f"cmpl-{request_id}-0")

    await pair.prefill(COMPLETIONS, BODY, request_id)

    assert (await other).status == 200
    state = await pair.d.wait_until(lambda s: s["aborted"] == 1)
    assert state["kv_waiting"] == {}


async def test_n_1_on_prefill_and_2_on_decode_hangs_until_the_prefill_is_replayed_with_2(pair: Pair) -> None:
    request_id = pair.new_id()
    assert (await pair.prefill(COMPLETIONS, BODY, request_id, n=1)).status == 200
    victim = asyncio.create_task(pair.post(pair.d, COMPLETIONS, {**BODY, "n": 2}, request_id))
    other = await pair.assert_hangs(pair.d, f"0_cmpl-{request_id}-0")

    assert (await pair.prefill(COMPLETIONS, BODY, request_id, n=2)).status == 200

    assert len((await victim).json["choices"]) == 2
    await other
    # What the first prefill sent under the id without a prefix stays behind.
    assert list(pair.d.state()["kv_waiting"]) == [f"cmpl-{request_id}-0"]


async def test_a_second_decode_of_an_id_hangs_until_the_prefill_is_replayed(pair: Pair) -> None:
    request_id = pair.new_id()
    _, first = await pair.both(COMPLETIONS, BODY, request_id)
    assert first.json["choices"][0]["text"] == RIGHT

    retry = asyncio.create_task(pair.post(pair.d, COMPLETIONS, BODY, request_id))
    other = await pair.assert_hangs(pair.d, f"cmpl-{request_id}-0")

    await pair.prefill(COMPLETIONS, BODY, request_id)
    assert (await retry).json["choices"][0]["text"] == RIGHT
    assert (await other).status == 200


async def test_a_prefill_cancelled_once_it_runs_has_sent_its_kv_which_stays_as_an_orphan(pair: Pair) -> None:
    request_id = pair.new_id()
    with pair.p.faults.held("answer"):
        leg = asyncio.create_task(pair.prefill(COMPLETIONS, BODY, request_id))
        await pair.p.wait_until(lambda s: s["held_at"] == "answer")
        await cancelled(leg)
    key = f"cmpl-{request_id}-0"
    state = await pair.d.wait_until(lambda s: s["kv_received"] == pair.d.config.kv_layers)
    assert state["kv_waiting"][key] == state["kv_buffer_used"] > 0

    assert await pair.ask("something else") == expected_text("something else", 8)
    assert key in pair.d.state()["kv_waiting"]


# 25 tokens of 1000 bytes: 25,000 per request and 6,250 (8,192 in the pool) per layer.
SMALL = {"kv_bytes_per_token": 1000, "kv_buffer_bytes": 50_000, "kv_pool_bytes": 65_536}
LONG = {"prompt": [7] * 25, "max_tokens": 4}


async def test_orphans_fill_buffer_and_pool_then_the_listener_dies_and_prefill_freezes_too() -> None:
    async with running(prefill=SMALL, decode=SMALL) as pair:
        for _ in range(4):
            assert (await pair.prefill(COMPLETIONS, LONG, pair.new_id())).status == 200
        state = await pair.d.wait_until(lambda s: s["kv_received"] == 16)
        assert (state["kv_buffer_used"], state["kv_pool_used"]) == (50_000, 65_536)
        assert len(state["kv_waiting"]) == 4

        fatal = pair.new_id()
        leg = asyncio.create_task(pair.prefill(COMPLETIONS, LONG, fatal))
        state = await pair.d.wait_until(lambda s: s["listener"] != "alive")
        assert "Insufficient memory" in state["listener"]
        frozen = await pair.assert_hangs(pair.p, f"cmpl-{fatal}-0")
        assert not leg.done()

        victim = asyncio.create_task(pair.post(pair.d, COMPLETIONS, LONG, fatal))
        stalled = await pair.assert_hangs(pair.d, f"cmpl-{fatal}-0")
        for engine in (pair.p, pair.d):
            assert (await pair.get(engine, "/health")).status == 200
        for task in (leg, frozen, victim, stalled):
            await cancelled(task)


async def test_a_drain_frees_an_orphan_so_any_number_goes_through() -> None:
    async with running(prefill=SMALL, decode=SMALL) as pair:
        for _ in range(24):
            request_id = pair.new_id()
            await pair.prefill(COMPLETIONS, LONG, request_id)
            drain = await pair.post(pair.d, COMPLETIONS, {**LONG, "max_tokens": 1}, request_id)
            assert drain.status == 200
        state = pair.d.state()
        assert (state["kv_waiting"], state["kv_buffer_used"], state["kv_pool_used"]) == ({}, 0, 0)
        assert state["kv_received"] == 24 * 4
        assert await pair.ask("business as usual") == expected_text("business as usual", 8)


async def test_orphans_in_the_pool_are_drained_as_well() -> None:
    async with running(prefill=SMALL, decode=SMALL) as pair:
        ids = [pair.new_id() for _ in range(4)]
        for request_id in ids:
            await pair.prefill(COMPLETIONS, LONG, request_id)
        await pair.d.wait_until(lambda s: s["kv_received"] == 16)
        for request_id in ids:
            answer = await pair.post(pair.d, COMPLETIONS, LONG, request_id)
            assert answer.json["choices"][0]["text"] == expected_text([7] * 25, 4)
        state = pair.d.state()
        assert (state["kv_waiting"], state["kv_buffer_used"], state["kv_pool_used"]) == ({}, 0, 0)


async def test_a_decode_aborted_mid_stream_leaves_nothing(pair: Pair) -> None:
    request_id = pair.new_id()
    body = {**BODY, "max_tokens": 50, "stream": True}
    await pair.prefill(COMPLETIONS, body, request_id)
    pair.d.faults.hold("schedule", after=3)
    url = f"http://{pair.d.http_address}{COMPLETIONS}"
    async with pair.http.post(url, json=body, headers={"X-Request-Id": request_id}) as response:
        assert (await response.content.readline()).startswith(b"data: ")
        await pair.d.wait_until(lambda s: s["held_at"] == "schedule")
    await pair.d.wait_until(lambda s: s["aborting"] == 1)
    pair.d.faults.release()

    state = await pair.d.wait_until(lambda s: s["aborted"] == 1 and s["running"] == 0)
    assert (state["steps"], state["kv_waiting"], state["kv_buffer_used"]) == (3, {}, 0)
    assert await pair.ask("next") == expected_text("next", 8)


async def test_a_killed_prefill_works_again_as_soon_as_it_is_back(pair: Pair) -> None:
    await pair.ask("before")
    await pair.p.kill()
    with pytest.raises(OSError):
        await pair.prefill(COMPLETIONS, BODY, pair.new_id())
    pair.p = pair.p.restarted()
    await pair.p.start()
    assert await pair.ask("after") == expected_text("after", 8)


async def test_a_killed_decode_freezes_prefill_even_when_it_is_back_until_both_restart(pair: Pair) -> None:
    await pair.ask("before")
    await pair.d.kill()
    request_id = pair.new_id()
    leg = asyncio.create_task(pair.prefill(COMPLETIONS, BODY, request_id))
    await pair.p.wait_until(lambda s: s["sender"] and s["sender"]["phase"] == "ack" and not s["sender"]["connected"])
    frozen = await pair.assert_hangs(pair.p, f"cmpl-{request_id}-0")

    pair.d = pair.d.restarted()
    await pair.d.start()
    # ZMQ delivers the old announcement to the new process, whose listener has no communicator for it.
    state = await pair.d.wait_until(lambda s: s["listener"] != "alive")
    assert "KeyError" in state["listener"]
    await pair.p.wait_until(lambda s: s["sender"]["phase"] == "data")
    still = await pair.assert_hangs(pair.p, f"cmpl-{request_id}-0")
    for task in (leg, frozen, still):
        await cancelled(task)

    await pair.p.kill()
    await pair.d.kill()
    pair.p, pair.d = pair.p.restarted(), pair.d.restarted()
    await pair.d.start()
    await pair.p.start()
    assert await pair.ask("after") == expected_text("after", 8)


async def test_a_prefill_that_never_spoke_to_decode_waits_for_it_and_goes_on() -> None:
    async with running() as pair:
        await pair.d.kill()
        request_id = pair.new_id()
        leg = asyncio.create_task(pair.prefill(COMPLETIONS, BODY, request_id))
        await pair.p.wait_until(lambda s: s["sender"] and s["sender"]["phase"] == "communicator")
        waiting = await pair.assert_hangs(pair.p, f"cmpl-{request_id}-0")

        pair.d = pair.d.restarted()
        await pair.d.start()

        assert (await leg).status == 200
        assert (await waiting).status == 200
        assert (await pair.post(pair.d, COMPLETIONS, BODY, request_id)).json["choices"][0]["text"] == RIGHT
