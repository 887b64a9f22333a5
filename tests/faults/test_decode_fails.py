"""Decode fails before the first byte of its answer. What it may have received is never asked again of anybody."""

import asyncio
import json
from collections import Counter

import pytest

from disagg_proxy.cluster.instance import State
from tests.conftest import soon
from tests.faults.conftest import ids, in_turn, without_kept_connections
from tests.simulated import REQUESTS, RIGHT, check_error, text_of

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
REFUSAL = b'{"error": {"message": "slow down", "type": "BadRequestError", "param": "top_k", "code": 418}}'


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_4xx_of_decode_passes_and_its_kv_is_drained(machine, pair, path: str, stream: bool) -> None:
    prefill, decode = pair
    decode.faults.fail_next(422, REFUSAL, {"Retry-After": "7"}, path=path)
    status, headers, raw = await machine.send(path, {**REQUESTS[path], "stream": stream})
    assert (status, headers["Retry-After"], raw) == (422, "7", REFUSAL)
    await soon(machine.proxy.until_idle())
    refused, drain = decode.received(path)
    assert refused.headers["X-Request-Id"] == drain.headers["X-Request-Id"]
    assert drain.json["max_tokens"] == 1 and drain.json["stream"] is False
    assert machine.proxy.services.stats.kv_releases.done == 1
    await machine.unharmed(prefill, decode)


@pytest.mark.settings(probe_interval=60.0)
async def test_decode_that_cannot_be_reached_is_502_and_out_at_once(unnoticed, machine, pair) -> None:
    prefill, decode = pair
    prefill.faults.hold("answer")
    request = machine.send(PATH, ASK)

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


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("body", [REFUSAL, b"", b"<html>Bad Gateway</html>"])
async def test_a_5xx_of_decode_is_502(machine, pair, stream: bool, body: bytes) -> None:
    _prefill, decode = pair
    decode.faults.fail_next(500, body, path=PATH)
    answer = await machine.send(PATH, {**ASK, "stream": stream})
    message = check_error(*answer, 502, "engine_failed")
    assert message.startswith("The decode instance failed with status 500") and "<" not in message
    await soon(machine.proxy.until_idle())
    assert len(decode.received(PATH)) == 1, "a decode that may have been received is neither repeated nor drained"
    assert machine.proxy.instance(decode.http_address).failures_total == 1
    await machine.check_right()


def error_in_a_stream(path: str, code: int | None) -> bytes:
    """What vLLM sends as the only events of a stream; on /v1/messages without a code."""
    if path == "/v1/messages":
        return b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"no such grammar"}}\n\n'
    error = {"message": "no such grammar", "type": "InternalServerError", "param": None, "code": code}
    return b"data: %b\n\ndata: [DONE]\n\n" % json.dumps({"error": error}).encode()


@pytest.mark.parametrize(
    ("path", "stream", "code", "status"),
    [
        (PATH, True, 500, 502), (PATH, True, 422, 422), (PATH, False, 500, 502),
        ("/v1/chat/completions", True, 500, 502), ("/v1/messages", True, None, 502),
    ],
)  # fmt: skip
async def test_a_200_of_decode_that_is_an_error_gets_its_own_status(
    machine, pair, path: str, stream: bool, code: int | None, status: int
) -> None:
    _prefill, decode = pair
    event, content = error_in_a_stream(path, code), "text/event-stream"
    if not stream:
        event, content = b'{"error": {"message": "no such grammar", "code": 500}}', "application/json"
    decode.faults.fail_next(200, event, {"Content-Type": content}, path=path)
    decode.faults.split = (20,)
    got = await machine.send(path, {**REQUESTS[path], "stream": stream})
    assert got[0] == status and b"no such grammar" in got[2] and got[1]["Content-Type"] == "application/json"
    await soon(machine.proxy.until_idle())
    assert len(decode.received(path)) == 1, "the engine may have the request and its KV: neither repeated nor drained"
    assert machine.proxy.services.stats.outcomes == {"client_error" if status == 422 else "engine_error": 1}
    there = machine.proxy.instance(decode.http_address)
    assert (there.in_flight, there.failures_total) == (0, int(status != 422 and path != "/v1/messages"))
    decode.faults.split = ()
    await machine.check_right()


@pytest.mark.settings(probe_interval=60.0)
async def test_a_decode_that_is_gone_means_a_new_prefill_with_a_new_id(unnoticed, machine, four) -> None:
    prefills, decodes = four
    with prefills[0].faults.held("answer"), prefills[1].faults.held("answer"):
        request = asyncio.ensure_future(machine.post(PATH, ASK))
        await soon(asyncio.wait([asyncio.ensure_future(p.wait_until(lambda s: s["held_at"])) for p in prefills],
                                return_when=asyncio.FIRST_COMPLETED))  # fmt: skip
        chosen = next(d for d in decodes if machine.proxy.instance(d.http_address).in_flight)
        await soon(chosen.wait_until(lambda s: s["kv_received"] == chosen.config.kv_layers))
        await chosen.kill()
    status, _, body = await soon(request)
    assert (status, text_of(body)) == (200, RIGHT[PATH])
    assert len(ids(*prefills)) == len(set(ids(*prefills))) == 2


async def refused_after_the_prefill(machine, prefill, decode, send):
    """Send a request, and have ``decode`` refuse connections before it is asked; its process lives."""
    prefill.faults.hold("answer")
    without_kept_connections(machine.proxy, decode)
    request = asyncio.ensure_future(send())
    await soon(prefill.wait_until(lambda state: state["held_at"] == "answer"))
    decode.faults.refuse_connections()
    prefill.faults.release()
    return await soon(request)


async def accepts_again(machine, decode) -> None:
    decode.faults.accept_connections()
    await soon(decode.wait_until(lambda state: state["accepting"]))
    machine.proxy.services.registry.recheck(machine.proxy.instance(decode.http_address))
    await soon(machine.proxy.until_state(decode.http_address, State.READY))


@pytest.mark.interpreted
@in_turn
async def test_a_decode_that_refuses_connections_means_a_new_id_and_a_drain_of_the_first_one(machine, four) -> None:
    prefills, decodes = four
    status, _, body = await refused_after_the_prefill(machine, prefills[0], decodes[0], lambda: machine.post(PATH, ASK))
    assert (status, text_of(body)) == (200, RIGHT[PATH])
    first, second = *ids(prefills[0]), *ids(prefills[1])
    assert ids(*decodes) == [second] != [first]
    assert list(decodes[0].state()["kv_waiting"]) == [f"cmpl-{first}-0"]
    assert machine.proxy.services.stats.failovers == 1

    await accepts_again(machine, decodes[0])
    await soon(machine.proxy.until_idle())
    assert ids(decodes[0]) == [first] and decodes[0].received(PATH)[0].json["max_tokens"] == 1
    assert machine.proxy.services.stats.kv_releases.done == 1
    await machine.unharmed(*prefills, *decodes)


@pytest.mark.interpreted
async def test_the_only_decode_that_refuses_connections_is_502_and_drained_when_it_accepts(machine, pair) -> None:
    answer = await refused_after_the_prefill(machine, *pair, lambda: machine.send(PATH, ASK))
    assert check_error(*answer, 502, "engine_unreachable") == "The decode instance could not be reached."
    check_error(*await machine.send(PATH, ASK), 503, "no_pair")
    await accepts_again(machine, pair[1])
    await soon(machine.proxy.until_idle())
    assert ids(pair[1]) == ids(pair[0]) and machine.proxy.services.stats.kv_releases.done == 1
    await machine.unharmed(*pair)
    await machine.check_right()


@in_turn
async def test_a_decode_that_failed_after_it_was_asked_is_not_replaced(machine, four) -> None:
    _, decodes = four
    decodes[0].faults.reset_next(path=PATH)
    status, _, body = await machine.post(PATH, ASK)
    assert (status, body["error"]["code"]) == (502, "engine_disconnected")
    assert not decodes[1].received(PATH)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (lambda faults: faults.reset_next(path=PATH), "engine_disconnected"),
        (lambda faults: faults.close_next(path=PATH), "engine_disconnected"),
        (lambda faults: faults.hang_next(path=PATH), "engine_deadline"),
        (lambda faults: faults.fail_next(500, path=PATH), "engine_failed"),
        (lambda faults: faults.fail_next(502, headers={"Retry-After": "1"}, path=PATH), "engine_failed"),
    ],
    ids=["reset", "close", "hang", "500", "502"],
)
@pytest.mark.settings(probe_interval=60.0, decode_timeout=0.3)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_decode_is_never_asked_twice_for_one_id(machine, pair, fault, code: str, stream: bool) -> None:
    decode = pair[1]
    await machine.check_right()
    fault(decode.faults)
    answer = await machine.send(PATH, {**ASK, "stream": stream})
    check_error(*answer, 504 if code == "engine_deadline" else 502, code)
    await soon(machine.proxy.until_idle())
    await machine.check_right()
    asked = Counter(request.headers["X-Request-Id"] for request in decode.received(PATH))
    assert len(asked) == 3 and set(asked.values()) == {1}
    assert machine.proxy.instance(decode.http_address).in_flight == 0


@pytest.mark.settings(engine_api_key="sk-engine")
async def test_a_decode_that_refuses_the_proxys_own_key_is_no_fault_of_the_client(machine, pair) -> None:
    pair[1].faults.fail_next(401, b'{"error": "Unauthorized"}', path=PATH)
    assert "ENGINE_API_KEY" in check_error(*await machine.send(PATH, ASK), 502, "engine_failed")
    await machine.unharmed(*pair)
    assert machine.proxy.services.stats.kv_releases.done == 1


@pytest.mark.parametrize("path", REQUESTS)
async def test_what_only_decode_can_refuse_leaves_no_kv_behind(machine, path) -> None:
    pair = await machine.pair(max_model_len=64)
    status, _, answer = await machine.post(path, {**REQUESTS[path], "max_tokens": 1000})
    assert status == 400 and "maximum context length" in answer["error"]["message"]
    await machine.unharmed(*pair)
    assert machine.proxy.services.stats.kv_releases.done == 1
    status, _, answer = await machine.post(path, REQUESTS[path])
    assert (status, text_of(answer)) == (200, RIGHT[path])
