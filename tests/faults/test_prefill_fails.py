"""Prefill fails: another one is tried while one is there and the client waits; decode never hears of it, and there is
nothing to drain."""

import asyncio
import json

import pytest

from disagg_proxy.cluster.instance import State
from tests.conftest import soon
from tests.faults.conftest import ids, in_turn, lift_prefill_timeout
from tests.simulated import REQUESTS, check_error

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
REFUSAL = b'{"error": {"message": "slow down", "type": "BadRequestError", "param": "top_k", "code": 418}}'


@pytest.mark.parametrize(
    ("path", "status"),
    [*((PATH, status) for status in (400, 401, 404, 413)), *((p, 422) for p in REQUESTS)],
)
async def test_a_4xx_of_prefill_passes_and_decode_is_not_asked(machine, pair, path: str, status: int) -> None:
    prefill, decode = pair
    prefill.faults.fail_next(status, REFUSAL, {"Retry-After": "7", "X-Why": "busy"}, path=path)
    got, headers, raw = await machine.send(path, {**REQUESTS[path], "stream": True})
    assert (got, raw) == (status, REFUSAL)
    assert (headers["Retry-After"], headers["X-Why"]) == ("7", "busy")
    assert headers["Content-Type"] == "application/json"
    assert not decode.received(path)
    assert machine.proxy.services.stats.kv_releases.started == 0
    await machine.unharmed(*pair)


async def test_what_vllm_itself_refuses_comes_back_in_its_words(machine, pair) -> None:
    status, _, body = await machine.post(PATH, {**ASK, "temperature": -1})
    direct = {"X-Request-Id": "___prefill_addr_127.0.0.1:1___decode_addr_127.0.0.1:2_x"}
    async with machine.http.post(
        f"http://{pair[0].http_address}{PATH}", json={**ASK, "temperature": -1, "max_tokens": 1}, headers=direct
    ) as answer:
        assert (status, body) == (answer.status, await answer.json())
    assert status == 400


@pytest.mark.settings(probe_interval=60.0)
async def test_prefill_that_cannot_be_reached_is_502_and_out_at_once(unnoticed, machine, pair) -> None:
    prefill, decode = pair
    await prefill.kill()
    message = check_error(*await machine.send(PATH, ASK), 502, "engine_unreachable")
    assert message == "The prefill instance could not be reached."
    assert not decode.received(PATH)
    assert machine.proxy.instance(prefill.http_address).state is State.PROBING
    status, health = await machine.get("/health")
    assert (status, health["pairs"]) == (503, 0) and "no prefill instance is ready" in health["missing"][0]
    check_error(*await machine.send(PATH, ASK), 503, "no_pair")


@pytest.mark.parametrize(
    ("status", "body"), [(500, REFUSAL), (502, b""), (500, b"<html>Bad Gateway</html>"), (302, b"\xff\xfe")]
)
async def test_a_5xx_of_prefill_is_502_and_decode_is_not_asked(machine, pair, status: int, body: bytes) -> None:
    prefill, decode = pair
    prefill.faults.fail_next(status, body, {"Retry-After": "7"}, path=PATH)
    got, headers, raw = await machine.send(PATH, ASK)
    message = check_error(got, headers, raw, 502, "engine_failed")
    assert f"The prefill instance failed with status {status}" in message
    assert ("slow down" in message) == (body == REFUSAL) and "<" not in message
    assert headers["Retry-After"] == "7"
    assert not decode.received(PATH)
    assert machine.proxy.instance(prefill.http_address).failures_total == (status >= 500)
    await machine.check_right()


@pytest.mark.parametrize("path", REQUESTS)
async def test_a_200_of_prefill_without_an_answer_in_it_is_502(machine, pair, path: str) -> None:
    for body in (b"", b"{}", b"[]", b"null", b"<html>", b"\xff", b'{"choices": null}', b'{"id": "x"}'):
        pair[0].faults.fail_next(200, body, path=path)
        answer = await machine.send(path, REQUESTS[path])
        assert "answered 200, but" in check_error(*answer, 502, "engine_failed")
    assert not pair[1].received(path)


@pytest.mark.parametrize(("path", "code"), [("/v1/completions", 422), ("/v1/messages", 409)])
async def test_an_error_that_prefill_hides_in_a_200_gets_its_own_status(machine, pair, path: str, code: int) -> None:
    pair[0].faults.fail_next(200, json.dumps({"error": {"message": "no", "code": code}}), path=path)
    status, _, body = await machine.post(path, REQUESTS[path])
    assert (status, body["error"]["message"]) == (code, "no")
    assert not pair[1].received(path)


@in_turn
@pytest.mark.parametrize("how", ["5xx", "reset", "close"])
async def test_a_prefill_that_fails_is_replaced_with_a_new_id(machine, four, how: str) -> None:
    prefills, decodes = four
    bad = prefills[0].faults
    if how == "5xx":
        bad.fail_next(502, b"broken", path=PATH)
    else:
        # Once more than the one repetition that a kept connection gets.
        (bad.reset_next if how == "reset" else bad.close_next)(path=PATH, times=2)
    for _ in range(4):
        await machine.check_right()
    assert machine.proxy.services.stats.failovers == 1
    assert not set(ids(prefills[0])[:1]) & set(ids(prefills[1]))
    assert len(ids(*decodes)) == len(set(ids(*decodes))) == 4
    for engine in (*prefills, *decodes):
        assert not engine.state()["kv_waiting"] and engine.state()["stalled_on"] is None


@pytest.mark.settings(prefill_policy="round_robin", probe_interval=60.0)
async def test_a_prefill_that_is_gone_is_replaced(unnoticed, machine, four) -> None:
    prefills, _ = four
    await prefills[0].kill()
    for _ in range(4):
        await machine.check_right()
    assert len(prefills[1].received(PATH)) == 4


@in_turn
async def test_tries_are_bounded(machine, four) -> None:
    prefills, _ = four
    for prefill in prefills:
        prefill.faults.fail_next(500, b"", path=PATH, times=9)
    status, _, body = await machine.post(PATH, ASK)
    assert (status, body["error"]["code"]) == (502, "engine_failed")
    assert [len(prefill.received(PATH)) for prefill in prefills] == [1, 1]


@pytest.mark.settings(max_tries=1)
async def test_one_try_means_one_pair(machine, four) -> None:
    prefills, _ = four
    for prefill in prefills:
        prefill.faults.fail_next(500, b"", path=PATH)
    status, _, _ = await machine.post(PATH, ASK)
    assert status == 502 and sum(len(prefill.received(PATH)) for prefill in prefills) == 1


@in_turn
async def test_a_client_that_left_is_not_tried_for(machine, four) -> None:
    prefills, _ = four
    for prefill in prefills:
        prefill.faults.hold("answer")
    request = asyncio.ensure_future(machine.post(PATH, ASK))
    await soon(prefills[0].wait_until(lambda s: s["held_at"] == "answer"))
    request.cancel()
    await soon(machine.proxy.until_clients(0))
    await prefills[0].kill()
    await soon(machine.proxy.until_quiet())
    assert not prefills[1].received(PATH)


@pytest.mark.settings(engine_api_key="sk-engine")
async def test_a_prefill_that_refuses_the_proxys_own_key_is_no_fault_of_the_client(machine, pair) -> None:
    pair[0].faults.fail_next(401, b'{"error": "Unauthorized"}', path=PATH)
    assert "ENGINE_API_KEY" in check_error(*await machine.send(PATH, ASK), 502, "engine_failed")
    assert not pair[1].received(PATH)


FAILURES = {
    "400": lambda faults: faults.fail_next(400, REFUSAL, path=PATH),
    "429": lambda faults: faults.fail_next(429, REFUSAL, path=PATH),
    "500": lambda faults: faults.fail_next(500, path=PATH),
    "503": lambda faults: faults.fail_next(503, path=PATH),
    "302": lambda faults: faults.fail_next(302, path=PATH),
    "no answer in a 200": lambda faults: faults.fail_next(200, b"{}", path=PATH),
    "an error in a 200": lambda faults: faults.fail_next(200, b'{"error": {"message": "no", "code": 400}}', path=PATH),
    "reset": lambda faults: faults.reset_next(path=PATH, times=2),
    "close": lambda faults: faults.close_next(path=PATH, times=2),
}
"""What prefill can do instead of its work; a kept connection may be tried twice."""


leaving = pytest.mark.parametrize("leaves", [False, True], ids=["client waits", "client gone"])


@pytest.mark.settings(probe_interval=60.0)
@leaving
@pytest.mark.parametrize("failure", FAILURES)
async def test_no_decode_and_no_drain_follow_a_prefill_that_failed(machine, pair, dial, failure, leaves) -> None:
    FAILURES[failure](pair[0].faults)
    await check_no_decode_and_no_drain(machine, pair, dial, leaves)


@pytest.mark.settings(prefill_timeout=0.1, probe_interval=60.0)
@leaving
async def test_no_decode_and_no_drain_follow_a_prefill_that_hangs(machine, pair, dial, leaves) -> None:
    pair[0].faults.hang_next(path=PATH)
    await check_no_decode_and_no_drain(machine, pair, dial, leaves)


async def check_no_decode_and_no_drain(machine, pair, dial, leaves: bool) -> None:
    """Send a request whose prefill fails; the engines then serve the next one."""
    prefill, decode = pair
    client = await dial(machine.proxy.url)
    client.post(PATH, ASK)
    if leaves:
        await soon(prefill.wait_until(lambda state: bool(prefill.received(PATH))))
        await machine.left(client)
    else:
        assert (await client.head())[0] >= 400
    await soon(machine.proxy.until_idle())
    assert not decode.received(PATH), "decode would wait for ever for KV that does not come, and all with it"
    assert machine.proxy.services.stats.kv_releases.started == 0
    assert [machine.proxy.instance(engine.http_address).in_flight for engine in pair] == [0, 0]
    await machine.unharmed(*pair)
    lift_prefill_timeout(machine.proxy)
    await machine.check_right()
