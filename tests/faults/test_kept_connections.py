"""The retry rule (docs/retry.md), seen from what each engine received: which leg is asked twice, and when."""

import pytest

from tests.simulated import REQUESTS, check_error

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
TOO_LONG = {"prefill": {**ASK, "prompt": [1] * 32768}, "decode": {**ASK, "max_tokens": 10**6}}
"""By the engine that refuses it: vLLM raises this 400 inside its handler and closes the connection."""

pytestmark = pytest.mark.settings(probe_interval=60.0)


@pytest.mark.parametrize("how", ["reset_next", "close_next"])
async def test_prefill_is_asked_again_when_a_kept_connection_ends_before_any_answer(machine, pair, how: str) -> None:
    prefill, decode = pair
    await machine.check_right()
    getattr(prefill.faults, how)(path=PATH)
    await machine.check_right()
    before, lost, again = prefill.received(PATH)
    assert lost.peer == before.peer and again.peer != lost.peer, "a kept connection first, then a fresh one"
    assert lost.headers["X-Request-Id"] == again.headers["X-Request-Id"] and lost.body == again.body
    assert [r.headers["X-Request-Id"] for r in decode.received(PATH)][1:] == [again.headers["X-Request-Id"]]
    await machine.unharmed(*pair)


@pytest.mark.parametrize("how", ["reset_next", "close_next"])
async def test_prefill_is_asked_again_only_once(machine, pair, how: str) -> None:
    prefill, decode = pair
    await machine.check_right()
    getattr(prefill.faults, how)(path=PATH, times=2)
    check_error(*await machine.send(PATH, ASK), 502, "engine_disconnected")
    assert len(prefill.received(PATH)) == 3 and len(decode.received(PATH)) == 1
    assert machine.proxy.instance(prefill.http_address).failures_total == 1
    await machine.check_right()


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
    await machine.check_right()


@pytest.mark.parametrize("mode", ["close", "reset", "keep"])
@pytest.mark.parametrize("refuses", TOO_LONG)
async def test_vllms_400s_that_end_the_connection_harm_no_later_request(machine, mode: str, refuses: str) -> None:
    prefill, decode = await machine.pair(close_after_400=mode)
    for _ in range(3):
        status, _, body = await machine.post(PATH, TOO_LONG[refuses])
        assert status == 400 and "maximum context length" in body["error"]["message"]
        await machine.check_right()
    assert len(prefill.received(PATH)) == 6, "and nothing had to be asked twice"
    assert len(decode.received(PATH)) == (3 if refuses == "prefill" else 9), "right ones, refused ones, and drains"
    await machine.unharmed(prefill, decode)


@pytest.mark.parametrize("how", ["reset_next", "close_next"])
@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
async def test_so_are_engines_that_answer_alone(machine, pair, how: str, path: str) -> None:
    body = (
        {"prompt": "x"}
        if path == "/tokenize"
        else {"model": "sim-model", "messages": [{"role": "user", "content": "x"}]}
    )
    assert (await machine.post(path, body))[0] == 200
    for engine in pair:
        getattr(engine.faults, how)(path=path)
    for _ in pair:
        assert (await machine.post(path, body))[0] == 200
