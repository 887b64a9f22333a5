"""Drains: what frees KV whose decode will not come, when it is sent, and when it must not be."""

import asyncio
import gc

import pytest

from disagg_proxy.cluster.instance import State
from disagg_proxy.openai.prepare import Prepared
from tests.conftest import soon
from tests.faults.conftest import ids, without_kept_connections
from tests.simulated import REQUESTS

PATH = "/v1/completions"
ASK = REQUESTS[PATH]


async def abandon(machine, prefill, dial, path: str, body: dict) -> None:
    """Send a request, and leave while prefill computes; prefill goes on."""
    client = await dial(machine.proxy.url)
    with prefill.faults.held("answer"):
        client.post(path, body)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "answer"))
        await machine.left(client)
    await soon(machine.proxy.until_idle())


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("/v1/completions", {"n": 2, "min_tokens": 4, "stop": ["x"]}),
        ("/v1/completions", {"prompt": ["one", "two and more"], "best_of": 1}),
        ("/v1/completions", {"prompt": [5, 6, 7], "logprobs": 3, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {"n": 3, "max_completion_tokens": 50, "logprobs": True, "top_logprobs": 2}),
        ("/v1/messages", {"system": "Be brief.", "stop_sequences": ["x"]}),
    ],
)
async def test_a_drain_is_one_token_of_the_same_prompt_under_the_same_id(machine, pair, dial, path, extra) -> None:
    prefill, decode = pair
    body = {**REQUESTS[path], "max_tokens": 100, "stream": True, **extra}
    await abandon(machine, prefill, dial, path, body)
    (prefilled,), (drain,) = prefill.received(path), decode.received(path)
    assert drain.headers["X-Request-Id"] == prefilled.headers["X-Request-Id"]
    assert drain.json["max_tokens"] == 1 and drain.json.get("max_completion_tokens", 1) == 1
    assert drain.json["stream"] is False
    assert not {"min_tokens", "stream_options", "logprobs", "top_logprobs"} & drain.json.keys()
    for field in ("prompt", "messages", "system", "n", "model"):
        assert drain.json.get(field) == body.get(field)
    counts = (await machine.get("/stats"))[1]["kv_releases"]
    assert counts.pop("tokens") > 0
    assert counts == {"started": 1, "done": 1, "failed": 0, "waiting": 0}
    await machine.unharmed(*pair)


async def test_24_orphans_of_8000_tokens_go_through_a_buffer_of_8_gb(machine, dial) -> None:
    # The figures of docs/engine-behaviour.md: 1.18 GB each, so that seven fill the buffer and three more the pool.
    prefill, decode = await machine.pair(kv_bytes_per_token=147_456, kv_buffer_bytes=8 * 10**9, kv_pool_bytes=2**32)
    for number in range(24):
        await abandon(machine, prefill, dial, PATH, {**ASK, "prompt": [300 + number] * 8000})
    assert machine.proxy.services.stats.kv_releases.done == 24
    assert decode.state()["kv_buffer_used"] == decode.state()["kv_pool_used"] == 0
    await machine.unharmed(prefill, decode)
    await machine.check_right()


async def test_a_drain_that_fails_is_counted_and_not_repeated(machine, pair, dial, caplog) -> None:
    prefill, decode = pair
    decode.faults.fail_next(500, path=PATH)
    await abandon(machine, prefill, dial, PATH, ASK)
    drains = machine.proxy.services.stats.kv_releases
    assert (drains.started, drains.done, drains.failed) == (1, 0, 1)
    assert len(decode.received(PATH)) == 1
    assert machine.proxy.instance(decode.http_address).in_flight == 0
    assert "is not released from decode" in caplog.text


async def test_nothing_is_drained_after_a_failed_prefill(machine, pair, dial) -> None:
    prefill, decode = pair
    client = await dial(machine.proxy.url)
    with prefill.faults.held():
        client.post(PATH, ASK)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "schedule"))
        await machine.left(client)
        await prefill.kill()
    await soon(machine.proxy.until_idle())
    assert machine.proxy.services.stats.kv_releases.started == 0 and not decode.received(PATH)
    assert machine.proxy.instance(decode.http_address).in_flight == 0


async def test_many_abandoned_prefills_of_one_batch_are_all_drained(machine, pair, dial) -> None:
    prefill, decode = pair
    clients = [await dial(machine.proxy.url) for _ in range(20)]
    with prefill.faults.held():
        for number, client in enumerate(clients):
            client.post(PATH, {**ASK, "prompt": f"number {number}"})
        await soon(prefill.wait_until(lambda state: state["waiting"] == 20))
        for client in clients:
            client.leave()
        await soon(machine.proxy.services.shutdown.exchanges.ended())
    await soon(machine.proxy.until_idle())
    assert machine.proxy.services.stats.kv_releases.done == 20
    await machine.unharmed(prefill, decode)


async def test_a_drain_waits_for_a_place_on_a_busy_decode(machine, dial) -> None:
    prefill, decode = await machine.pair(max_num_seqs=1)
    stream = await dial(machine.proxy.url)
    decode.faults.hold("schedule", after=3)
    stream.post(PATH, {**ASK, "stream": True})
    await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
    client = await dial(machine.proxy.url)
    with prefill.faults.held("answer"):
        client.post(PATH, ASK)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "answer"))
        client.leave()
        await soon(machine.proxy.until_clients(1))
    await soon(decode.wait_until(lambda state: state["waiting"] == 1))
    drains = machine.proxy.services.stats.kv_releases
    assert (drains.started, drains.done, drains.waiting) == (1, 0, 1)
    decode.faults.release()
    assert (await stream.answer())[0] == 200
    await soon(machine.proxy.until_idle())
    assert (drains.done, drains.waiting) == (1, 0)
    await machine.unharmed(prefill, decode)


@pytest.mark.settings(decode_max_in_flight=1)
async def test_a_drain_counts_as_load(machine, pair, dial) -> None:
    prefill, decode = pair
    decode.faults.hold("schedule")
    client = await dial(machine.proxy.url)
    with prefill.faults.held("answer"):
        client.post(PATH, ASK)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "answer"))
        await machine.left(client)
    await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
    assert machine.proxy.instance(decode.http_address).in_flight == 1
    next_one = asyncio.ensure_future(machine.check_right())
    while not machine.proxy.services.admission_queue.waiting:
        await asyncio.sleep(0)
    assert len(prefill.received(PATH)) == 1, "the next request waits until the drain is done"
    decode.faults.release()
    await soon(next_one)
    await machine.unharmed(prefill, decode)


@pytest.mark.parametrize("status", [429, 503])
async def test_a_drain_that_is_turned_away_is_tried_again(machine, pair, dial, status: int) -> None:
    prefill, decode = pair
    decode.faults.fail_next(status, path=PATH)
    await abandon(machine, prefill, dial, PATH, ASK)
    assert ids(decode) == 2 * ids(prefill) and machine.proxy.services.stats.kv_releases.done == 1
    await machine.unharmed(prefill, decode)


@pytest.mark.interpreted
async def test_a_drain_is_tried_again_while_decode_refuses_connections(machine, pair, dial) -> None:
    prefill, decode = pair
    without_kept_connections(machine.proxy, decode)
    client = await dial(machine.proxy.url)
    with prefill.faults.held("answer"):
        client.post(PATH, ASK)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "answer"))
        await machine.left(client)
        decode.faults.refuse_connections()
    await soon(machine.proxy.until_state(decode.http_address, State.PROBING))
    assert len(decode.state()["kv_waiting"]) == 1
    decode.faults.accept_connections()
    await soon(machine.proxy.until_idle())
    (drain,) = decode.received(PATH)
    assert drain.headers["X-Request-Id"] in ids(prefill) and machine.proxy.services.stats.kv_releases.done == 1
    await machine.unharmed(prefill, decode)


async def test_a_drain_of_a_decode_that_died_is_given_up_at_once(machine, pair, dial) -> None:
    prefill, decode = pair
    client = await dial(machine.proxy.url)
    with prefill.faults.held("answer"):
        client.post(PATH, ASK)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "answer"))
        await soon(decode.wait_until(lambda state: state["kv_received"] == decode.config.kv_layers))
        await machine.left(client)
        await machine.kill(decode)
    # Less than the half minute of its tries.
    await asyncio.wait_for(machine.proxy.until_idle(), 20.0)
    drains = machine.proxy.services.stats.kv_releases
    assert (drains.started, drains.done, drains.failed, drains.waiting) == (1, 0, 1, 0)
    assert [machine.proxy.instance(engine.http_address).in_flight for engine in pair] == [0, 0]


async def test_the_prompt_of_an_ordinary_request_is_not_kept_while_its_answer_streams(machine, pair) -> None:
    """Only a try whose KV is still to be released keeps it."""
    prefill, decode = pair
    prompt = "a prompt that no other test has"

    def kept() -> list[bytes]:
        bodies = [b for o in gc.get_objects() if type(o) is Prepared for b in (o.prefill_body, o.decode_body)]
        return [body for body in bodies if prompt.encode() in body]

    decode.faults.hold("schedule", after=3)
    body = {**ASK, "prompt": prompt, "stream": True}
    async with machine.http.post(machine.proxy.url + PATH, json=body) as stream:
        await soon(stream.content.readany())
        await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
        assert kept() == []
        decode.faults.release()
        await soon(stream.read())
    await machine.unharmed(*pair)
    with prefill.faults.held("answer"):
        waiting = asyncio.ensure_future(machine.post(PATH, {**ASK, "prompt": prompt}))
        await soon(prefill.wait_until(lambda state: state["held_at"] == "answer"))
        assert kept(), "the bodies are found where they are kept"
    assert (await soon(waiting))[0] == 200
