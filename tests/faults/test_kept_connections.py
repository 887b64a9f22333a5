"""The retry rule (docs/retry.md), seen from what each engine received: which leg is asked twice, and when."""

from collections import Counter

import pytest

from tests.conftest import soon
from tests.machine import REQUESTS, RIGHT, check_error, text_of

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
TOO_LONG = {"prefill": {**ASK, "prompt": [1] * 32768}, "decode": {**ASK, "max_tokens": 10**6}}
"""By the engine that refuses it: vLLM raises this 400 inside its handler and closes the connection."""

pytestmark = pytest.mark.settings(probe_interval=60.0, decode_timeout=0.3)


async def check_right(machine) -> None:
    status, _, body = await machine.post(PATH, ASK)
    assert status == 200 and text_of(body) == RIGHT[PATH]


@pytest.mark.parametrize("how", ["reset_next", "close_next"])
async def test_prefill_is_asked_again_when_a_kept_connection_ends_before_any_answer(machine, pair, how: str) -> None:
    prefill, decode = pair
    await check_right(machine)
    getattr(prefill.faults, how)(path=PATH)
    await check_right(machine)
    before, lost, again = prefill.received(PATH)
    assert lost.peer == before.peer and again.peer != lost.peer, "a kept connection first, then a fresh one"
    assert lost.headers["X-Request-Id"] == again.headers["X-Request-Id"] and lost.body == again.body
    assert [r.headers["X-Request-Id"] for r in decode.received(PATH)][1:] == [again.headers["X-Request-Id"]]
    await machine.unharmed(*pair)


@pytest.mark.parametrize("how", ["reset_next", "close_next"])
async def test_prefill_is_asked_again_only_once(machine, pair, how: str) -> None:
    prefill, decode = pair
    await check_right(machine)
    getattr(prefill.faults, how)(path=PATH, times=2)
    check_error(*await machine.send(PATH, ASK), 502, "engine_disconnected")
    assert len(prefill.received(PATH)) == 3 and len(decode.received(PATH)) == 1
    assert machine.proxy.instance(prefill.http_address).failures_total == 1
    await check_right(machine)


@pytest.mark.parametrize("how", ["reset_next", "close_next"])
async def test_a_fresh_connection_that_ends_is_no_reason_to_ask_again(machine, pair, how: str) -> None:
    prefill, decode = pair
    # After a 400 the proxy uses no kept connection.
    assert (await machine.send(PATH, TOO_LONG["prefill"]))[0] == 400
    getattr(prefill.faults, how)(path=PATH)
    check_error(*await machine.send(PATH, ASK), 502, "engine_disconnected")
    refused, lost = prefill.received(PATH)
    assert lost.peer != refused.peer
    assert not decode.received(PATH)
    await check_right(machine)


@pytest.mark.parametrize("mode", ["close", "reset", "keep"])
@pytest.mark.parametrize("refuses", TOO_LONG)
async def test_vllms_400s_that_end_the_connection_harm_no_later_request(machine, mode: str, refuses: str) -> None:
    prefill, decode = await machine.pair(close_after_400=mode)
    for _ in range(3):
        status, _, body = await machine.post(PATH, TOO_LONG[refuses])
        assert status == 400 and "maximum context length" in body["error"]["message"]
        await check_right(machine)
    assert len(prefill.received(PATH)) == 6, "and nothing had to be asked twice"
    assert len(decode.received(PATH)) == (3 if refuses == "prefill" else 9), "right ones, refused ones, and drains"
    await machine.unharmed(prefill, decode)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (lambda faults: faults.reset_next(path=PATH), "engine_disconnected"),
        (lambda faults: faults.close_next(path=PATH), "engine_disconnected"),
        (lambda faults: faults.hang_next(path=PATH), "engine_deadline"),
        (lambda faults: faults.fail_next(500, path=PATH), "engine_failed"),
        (lambda faults: faults.fail_next(503, headers={"Retry-After": "1"}, path=PATH), "engine_failed"),
    ],
    ids=["reset", "close", "hang", "500", "503"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_decode_is_never_asked_twice_for_one_id(machine, pair, fault, code: str, stream: bool) -> None:
    decode = pair[1]
    await check_right(machine)
    fault(decode.faults)
    answer = await machine.send(PATH, {**ASK, "stream": stream})
    check_error(*answer, 504 if code == "engine_deadline" else 502, code)
    await soon(machine.proxy.until_idle())
    await check_right(machine)
    asked = Counter(request.headers["X-Request-Id"] for request in decode.received(PATH))
    assert len(asked) == 3 and set(asked.values()) == {1}
    assert machine.proxy.instance(decode.http_address).in_flight == 0
