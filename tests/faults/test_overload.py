"""More requests than the engines should have at once wait at the proxy, in order, and not for ever."""

import asyncio
from typing import Any

import pytest

from disagg_proxy.openai.prepare import PromptSize
from disagg_sim import expected_text
from tests.conftest import soon
from tests.faults.conftest import ids
from tests.simulated import Machine, text_of, text_of_events

COMPLETIONS = "/v1/completions"
PROMPT = "San Francisco is a"


def ask(machine: Machine, **more: Any) -> "asyncio.Future[tuple[int, Any, Any]]":
    return asyncio.ensure_future(machine.post(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 3, **more}))


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0)


def waiting(machine: Machine, count: int):
    return soon(until(lambda: machine.proxy.services.admission_queue.waiting == count))


@pytest.mark.settings(decode_max_in_flight=2)
async def test_beyond_the_limit_requests_wait_and_then_are_served_in_order(machine, pair) -> None:
    prefill, decode = pair
    decode.faults.hold("schedule")
    requests = []
    for i in range(5):
        requests.append(ask(machine, prompt=f"{PROMPT} {i}"))
        await soon(
            until(lambda i=i: machine.proxy.services.admission_queue.waiting + decode_load(machine, decode) == i + 1)
        )
    assert machine.proxy.services.admission_queue.waiting == 3
    assert len(prefill.received(COMPLETIONS)) <= 2
    decode.faults.release()
    for i, (status, _, body) in enumerate(await soon(asyncio.gather(*requests))):
        assert (status, body["choices"][0]["text"]) == (200, expected_text(f"{PROMPT} {i}", 3))
    order = [request.json["prompt"] for request in prefill.received(COMPLETIONS)]
    assert order[2:] == sorted(order[2:])
    _, stats = await machine.get("/stats")
    assert stats["requests"]["queued"] == 0 and stats["latency"]["queue"]["count"] == 3


def decode_load(machine: Machine, decode) -> int:
    return machine.proxy.instance(decode.http_address).in_flight


@pytest.mark.settings(max_in_flight=1, max_queue=1)
async def test_a_full_queue_is_429_with_retry_after(machine, pair) -> None:
    pair[1].faults.hold("schedule")
    first, second = ask(machine), ask(machine)
    await waiting(machine, 1)
    status, headers, body = await machine.post(COMPLETIONS, {"prompt": PROMPT})
    assert (status, body["error"]["type"]) == (429, "rate_limit_error") and int(headers["Retry-After"]) >= 1
    pair[1].faults.release()
    assert [(await soon(request))[0] for request in (first, second)] == [200, 200]
    _, stats = await machine.get("/stats")
    assert stats["requests"]["turned_away"] == 1


@pytest.mark.settings(decode_max_in_flight=1, queue_timeout=0.05)
async def test_a_wait_that_is_too_long_is_429(machine, pair) -> None:
    pair[1].faults.hold("schedule")
    first = ask(machine)
    await soon(until(lambda: decode_load(machine, pair[1])))
    status, _, body = await ask(machine)
    assert status == 429 and "QUEUE_TIMEOUT" in body["error"]["message"]
    pair[1].faults.release()
    assert (await soon(first))[0] == 200


@pytest.mark.settings(prefill_max_in_flight=1)
async def test_a_client_that_leaves_the_queue_costs_nothing(machine, pair) -> None:
    prefill, _ = pair
    prefill.faults.hold("answer")
    first = ask(machine)
    await soon(until(lambda: prefill.received(COMPLETIONS)))
    gone, last = ask(machine, prompt="gone"), ask(machine)
    await waiting(machine, 2)
    gone.cancel()
    await waiting(machine, 1)
    prefill.faults.release()
    assert [(await soon(request))[0] for request in (first, last)] == [200, 200]
    assert "gone" not in [request.json["prompt"] for request in prefill.received(COMPLETIONS)]
    assert not machine.proxy.services.registry.instances()[0].in_flight


@pytest.mark.settings(kv_buffer_bytes=1_000_000, kv_bytes_per_token=1000)
async def test_a_burst_of_long_prompts_never_fills_the_decode_buffer(machine) -> None:
    _prefill, decode = await machine.pair(kv_bytes_per_token=1000, kv_buffer_bytes=1_000_000, kv_pool_bytes=1)
    prompts = [[5 + i] * 400 for i in range(12)]
    decode.faults.hold("schedule")
    requests = [ask(machine, prompt=prompt) for prompt in prompts]
    await waiting(machine, 10)
    assert machine.proxy.instance(decode.http_address).kv_waiting_tokens == 800
    decode.faults.release()
    assert [(await soon(request))[0] for request in requests] == [200] * 12
    assert decode.state()["listener"] == "alive" and not decode.state()["kv_waiting"]
    assert machine.proxy.instance(decode.http_address).kv_waiting_tokens == 0


@pytest.mark.settings(kv_buffer_bytes=1000, kv_bytes_per_token=1000)
async def test_a_prompt_above_the_buffer_goes_alone(machine, pair) -> None:
    requests = [ask(machine, prompt=[7] * 50), ask(machine, prompt=[8] * 60)]
    assert [(await soon(request))[0] for request in requests] == [200, 200]


@pytest.mark.settings(decode_max_in_flight=1)
async def test_one_model_that_is_full_does_not_hold_up_another(machine) -> None:
    _, decode_a = await machine.pair(models=("a",))
    await machine.pair(models=("b",))
    decode_a.faults.hold("schedule")
    busy = [ask(machine, model="a") for _ in range(3)]
    await waiting(machine, 2)
    assert (await soon(ask(machine, model="b")))[0] == 200
    decode_a.faults.release()
    assert [(await soon(request))[0] for request in busy] == [200] * 3


@pytest.mark.settings(decode_max_in_flight=1, probe_interval=60.0)
async def test_those_that_wait_are_told_when_the_last_pair_goes(machine, pair) -> None:
    pair[0].faults.hold("answer")
    first = ask(machine)
    await soon(until(lambda: pair[0].received(COMPLETIONS)))
    queued = ask(machine)
    await waiting(machine, 1)
    await pair[1].kill()
    assert (await soon(queued))[0] == 503
    await pair[0].kill()
    assert (await soon(first))[0] == 502


@pytest.mark.settings(kv_bytes_per_token=1)
async def test_sizes_are_learnt_from_prefill(machine, pair) -> None:
    services = machine.proxy.services
    text = " people between" * 200
    for expected in (750, 489):
        assert services.sizes.estimator.tokens("sim-model", PromptSize(0, len(text))) == expected
        assert (await machine.post(COMPLETIONS, {"model": "sim-model", "prompt": text, "max_tokens": 1}))[0] == 200


few = pytest.mark.settings(max_in_flight=20, prefill_max_in_flight=8, decode_max_in_flight=16)


@pytest.mark.parametrize("waiting", [pytest.param(0, id="no limits"), pytest.param(180, id="limits", marks=few)])
async def test_200_requests_of_64_tokens_at_once_are_all_answered(machine, pair, waiting: int) -> None:
    async def one(number: int) -> None:
        body = {"prompt": f"Number {number} of 200", "max_tokens": 64, "ignore_eos": True}
        right = expected_text(body["prompt"], 64, ignore_eos=True)
        if number % 2:
            assert text_of_events(await machine.stream(COMPLETIONS, body)) == right
        else:
            assert text_of((await machine.post(COMPLETIONS, body))[2]) == right

    await asyncio.gather(*map(one, range(200)))
    stats = machine.proxy.services.stats
    await soon(machine.proxy.until_clients(0))
    assert stats.queued.count >= waiting
    assert stats.outcomes == {"ok": 200} and (stats.failovers, stats.kv_releases.started) == (0, 0)
    assert [len(set(ids(engine))) for engine in pair] == [200, 200]
    await machine.unharmed(*pair)


@pytest.mark.settings(kv_buffer_bytes=1_000_000, kv_bytes_per_token=1000, probe_interval=60.0)
async def test_what_a_dead_decode_leaves_behind_waits_for_room_on_the_other(machine) -> None:
    """Two prompts fit on each decode; four on the one that is left would end its listener and freeze both prefills."""
    knobs = {"kv_bytes_per_token": 1000, "kv_buffer_bytes": 1_000_000, "kv_pool_bytes": 1}
    pairs = [await machine.pair(**knobs), await machine.pair(**knobs)]
    prefills, decodes = zip(*pairs, strict=True)
    for engine in (*prefills, *decodes):
        engine.faults.hold("schedule")
    prompts = [[5 + number] * 450 for number in range(4)]
    requests = []
    for prompt in prompts:
        body = {"prompt": prompt, "max_tokens": 3}
        requests.append(asyncio.ensure_future(machine.stream(COMPLETIONS, body)))
        await soon(until(lambda: len(ids(*prefills)) == len(requests)))
    for prefill in prefills:
        prefill.faults.hold("answer")
        prefill.faults.release("schedule")
        await soon(prefill.wait_until(lambda state: state["held_at"] == "answer" and state["waiting"] == 0))
    for decode in decodes:
        layers = 2 * decode.config.kv_layers
        await soon(decode.wait_until(lambda state, layers=layers: state["kv_received"] == layers))

    await machine.kill(decodes[0])
    for prefill in prefills:
        prefill.faults.release()
    await waiting(machine, 2)
    assert machine.proxy.instance(decodes[1].http_address).kv_waiting_tokens == 928
    decodes[1].faults.release()
    for prompt, events in zip(prompts, await soon(asyncio.gather(*requests)), strict=True):
        assert text_of_events(events) == expected_text(prompt, 3)
    await machine.unharmed(*prefills, decodes[1])
