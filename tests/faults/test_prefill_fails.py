"""What an engine does wrong before the answer begins: the status that the client gets, and what the other engine is
asked."""

import asyncio
import json

import pytest

from disagg_proxy.cluster.instance import State
from disagg_proxy.sim import expected_text
from tests.conftest import soon
from tests.machine import REQUESTS, RIGHT, check_error, events, text_of, text_of_events

COMPLETIONS = "/v1/completions"
ASK = REQUESTS[COMPLETIONS]
REFUSAL = b'{"error": {"message": "slow down", "type": "BadRequestError", "param": "top_k", "code": 418}}'


async def check_right(machine) -> None:
    """The next request is answered rightly."""
    status, _, body = await machine.post(COMPLETIONS, ASK)
    assert status == 200 and text_of(body) == RIGHT[COMPLETIONS]


@pytest.mark.parametrize(
    ("path", "status"),
    [*((COMPLETIONS, status) for status in (400, 401, 404, 413, 422)), *((p, 429) for p in REQUESTS)],
)
async def test_a_4xx_of_prefill_passes_and_decode_is_not_asked(machine, pair, path: str, status: int) -> None:
    prefill, decode = pair
    prefill.faults.fail_next(status, REFUSAL, {"Retry-After": "7", "X-Why": "busy"}, path=path)
    got, headers, raw = await machine.send(path, {**REQUESTS[path], "stream": True})
    assert (got, raw) == (status, REFUSAL)
    assert (headers["Retry-After"], headers["X-Why"]) == ("7", "busy")
    assert headers["Content-Type"] == "application/json"
    assert not decode.received(path)
    assert machine.proxy.services.stats.drains.started == 0
    await machine.unharmed(*pair)


async def test_what_vllm_itself_refuses_comes_back_in_its_words(machine, pair) -> None:
    status, _, body = await machine.post(COMPLETIONS, {**ASK, "temperature": -1})
    direct = {"X-Request-Id": "___prefill_addr_127.0.0.1:1___decode_addr_127.0.0.1:2_x"}
    async with machine.http.post(
        f"http://{pair[0].http_address}{COMPLETIONS}", json={**ASK, "temperature": -1, "max_tokens": 1}, headers=direct
    ) as answer:
        assert (status, body) == (answer.status, await answer.json())
    assert status == 400


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_4xx_of_decode_passes_and_its_kv_is_drained(machine, pair, path: str, stream: bool) -> None:
    prefill, decode = pair
    decode.faults.fail_next(429, REFUSAL, {"Retry-After": "7"}, path=path)
    status, headers, raw = await machine.send(path, {**REQUESTS[path], "stream": stream})
    assert (status, headers["Retry-After"], raw) == (429, "7", REFUSAL)
    await soon(machine.proxy.until_idle())
    refused, drain = decode.received(path)
    assert refused.headers["X-Request-Id"] == drain.headers["X-Request-Id"]
    assert drain.json["max_tokens"] == 1 and drain.json["stream"] is False
    assert machine.proxy.services.stats.drains.done == 1
    await machine.unharmed(prefill, decode)


@pytest.mark.settings(probe_interval=60.0)
async def test_prefill_that_cannot_be_reached_is_502_and_out_at_once(unnoticed, machine, pair) -> None:
    prefill, decode = pair
    await prefill.kill()
    message = check_error(*await machine.send(COMPLETIONS, ASK), 502, "engine_unreachable")
    assert message == "The prefill instance could not be reached."
    assert not decode.received(COMPLETIONS)
    assert machine.proxy.instance(prefill.http_address).state is State.PROBING
    status, health = await machine.get("/health")
    assert (status, health["pairs"]) == (503, 0) and "no prefill instance is ready" in health["missing"][0]
    check_error(*await machine.send(COMPLETIONS, ASK), 503, "no_pair")


@pytest.mark.settings(probe_interval=60.0)
async def test_decode_that_cannot_be_reached_is_502_and_out_at_once(unnoticed, machine, pair) -> None:
    prefill, decode = pair
    prefill.faults.hold("answer")
    request = machine.send(COMPLETIONS, ASK)

    async def fail() -> None:
        await prefill.wait_until(lambda state: state["held_at"] == "answer")
        await decode.wait_until(lambda state: state["kv_received"] == decode.config.kv_layers)
        await decode.kill()
        prefill.faults.release()

    (status, headers, raw), _ = await soon(asyncio.gather(request, fail()))
    assert check_error(status, headers, raw, 502, "engine_unreachable") == "The decode instance could not be reached."
    assert machine.proxy.instance(decode.http_address).state is State.PROBING
    await soon(machine.proxy.until_idle())
    assert machine.proxy.instance(decode.http_address).in_flight == 0


@pytest.mark.parametrize(
    ("status", "body"), [(500, REFUSAL), (503, b""), (500, b"<html>Bad Gateway</html>"), (302, b"\xff\xfe")]
)
async def test_a_5xx_of_prefill_is_502_and_decode_is_not_asked(machine, pair, status: int, body: bytes) -> None:
    prefill, decode = pair
    prefill.faults.fail_next(status, body, {"Retry-After": "7"}, path=COMPLETIONS)
    got, headers, raw = await machine.send(COMPLETIONS, ASK)
    message = check_error(got, headers, raw, 502, "engine_failed")
    assert f"The prefill instance failed with status {status}" in message
    assert ("slow down" in message) == (body == REFUSAL) and "<" not in message
    assert headers["Retry-After"] == "7"
    assert not decode.received(COMPLETIONS)
    assert machine.proxy.instance(prefill.http_address).failures_total == (status >= 500)
    await check_right(machine)


@pytest.mark.parametrize("path", REQUESTS)
async def test_a_200_of_prefill_without_an_answer_in_it_is_502(machine, pair, path: str) -> None:
    for body in (b"", b"{}", b"[]", b"null", b"<html>", b"\xff", b'{"choices": null}', b'{"id": "x"}'):
        pair[0].faults.fail_next(200, body, path=path)
        answer = await machine.send(path, REQUESTS[path])
        assert "answered 200, but" in check_error(*answer, 502, "engine_failed")
    assert not pair[1].received(path)


@pytest.mark.parametrize(("path", "code"), [("/v1/completions", 422), ("/v1/messages", 429)])
async def test_an_error_that_prefill_hides_in_a_200_gets_its_own_status(machine, pair, path: str, code: int) -> None:
    pair[0].faults.fail_next(200, json.dumps({"error": {"message": "no", "code": code}}), path=path)
    status, _, body = await machine.post(path, REQUESTS[path])
    assert (status, body["error"]["message"]) == (code, "no")
    assert not pair[1].received(path)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("body", [REFUSAL, b"", b"<html>Bad Gateway</html>"])
async def test_a_5xx_of_decode_is_502(machine, pair, stream: bool, body: bytes) -> None:
    prefill, decode = pair
    decode.faults.fail_next(500, body, path=COMPLETIONS)
    answer = await machine.send(COMPLETIONS, {**ASK, "stream": stream})
    message = check_error(*answer, 502, "engine_failed")
    assert message.startswith("The decode instance failed with status 500") and "<" not in message
    await soon(machine.proxy.until_idle())
    assert len(decode.received(COMPLETIONS)) == 1, (
        "a decode that may have been received is neither repeated nor drained"
    )
    assert machine.proxy.instance(decode.http_address).failures_total == 1
    await check_right(machine)


@pytest.mark.settings(engine_api_key="sk-engine")
@pytest.mark.parametrize("leg", [0, 1], ids=["prefill", "decode"])
async def test_an_engine_that_refuses_the_proxys_own_key_is_no_fault_of_the_client(machine, pair, leg: int) -> None:
    pair[leg].faults.fail_next(401, b'{"error": "Unauthorized"}', path=COMPLETIONS)
    assert "ENGINE_API_KEY" in check_error(*await machine.send(COMPLETIONS, ASK), 502, "engine_failed")


@pytest.mark.settings(probe_interval=0.05)
@pytest.mark.parametrize("leg", [0, 1], ids=["prefill", "decode"])
async def test_a_dead_engine_is_found_out_by_its_health(machine, pair, leg: int) -> None:
    engine = pair[leg]
    async with machine.http.post(f"http://{engine.http_address}{COMPLETIONS}", json=ASK) as direct:
        assert direct.status == 500, "a request without addresses in its id kills an engine"
    await soon(machine.proxy.until_state(engine.http_address, State.PROBING))
    assert "/health answers 503" in machine.proxy.instance(engine.http_address).reason
    check_error(*await machine.send(COMPLETIONS, ASK), 503, "no_pair")


@pytest.mark.settings(probe_interval=60.0)
async def test_a_prefill_that_has_died_is_502_until_it_is_found_out(machine, pair) -> None:
    prefill, decode = pair
    async with machine.http.post(f"http://{prefill.http_address}{COMPLETIONS}", json=ASK) as direct:
        assert direct.status == 500
    assert "EngineCore" in check_error(*await machine.send(COMPLETIONS, ASK), 502, "engine_failed")
    assert not decode.received(COMPLETIONS)


async def test_an_answer_in_small_pieces_is_the_same_answer(machine, pair) -> None:
    for engine in pair:
        engine.faults.split_writes([1, 2, 7])
    await check_right(machine)
    _, _, raw = await machine.send(COMPLETIONS, {**ASK, "stream": True})
    assert text_of_events(events(raw)) == expected_text(ASK["prompt"], 8)
