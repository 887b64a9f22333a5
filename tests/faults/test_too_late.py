"""An engine that is too late: the client gets 504, and the leg's own end is still seen to."""

import asyncio

import pytest

from tests.conftest import soon
from tests.faults.conftest import lift_prefill_timeout
from tests.simulated import REQUESTS, RIGHT, check_error, text_of

PATH = "/v1/completions"
ASK = REQUESTS[PATH]


@pytest.mark.settings(prefill_timeout=0.4)
@pytest.mark.parametrize("path", REQUESTS)
async def test_a_late_prefill_is_504_but_runs_on_and_is_drained(machine, pair, path: str) -> None:
    prefill, decode = pair
    with prefill.faults.held():
        message = check_error(*await machine.send(path, REQUESTS[path]), 504, "engine_deadline")
        assert message == "The prefill did not finish within 0.4 s."
        assert prefill.state()["waiting"] == 1 and prefill.state()["aborted"] == 0
        await soon(machine.proxy.until_clients(0))
    await soon(machine.proxy.until_idle())
    (drain,) = decode.received(path)
    assert drain.headers["X-Request-Id"] == prefill.received(path)[0].headers["X-Request-Id"]
    assert machine.proxy.services.stats.kv_releases.done == 1
    assert machine.proxy.services.stats.outcomes == {"deadline": 1}
    assert prefill.state()["aborted"] == 0
    await machine.unharmed(*pair)
    lift_prefill_timeout(machine.proxy)
    assert text_of((await machine.post(path, REQUESTS[path]))[2]) == RIGHT[path]


@pytest.mark.settings(prefill_timeout=0.1)
async def test_a_prefill_that_never_answers_is_given_up_in_the_end(machine, pair) -> None:
    prefill, decode = pair
    prefill.faults.hang_next(path=PATH)
    check_error(*await machine.send(PATH, ASK), 504, "engine_deadline")
    assert machine.proxy.instance(prefill.http_address).in_flight == 1
    await soon(machine.proxy.until_idle())
    assert [machine.proxy.instance(engine.http_address).in_flight for engine in pair] == [0, 0]
    assert not decode.received(PATH), "its KV may never have been sent"


@pytest.mark.settings(decode_timeout=0.2)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_decode_that_says_nothing_is_504(machine, pair, stream: bool) -> None:
    decode = pair[1]
    decode.faults.hang_next(path=PATH)
    answer = await machine.send(PATH, {**ASK, "stream": stream})
    message = check_error(*answer, 504, "engine_deadline")
    assert message == "The decode instance sent nothing for 0.2 s."
    await soon(machine.proxy.until_idle())
    assert len(decode.received(PATH)) == 1
    assert machine.proxy.instance(decode.http_address).in_flight == 0


@pytest.mark.settings(decode_timeout=0.2)
async def test_a_decode_that_computes_too_long_is_504_and_aborted(machine, pair) -> None:
    decode = pair[1]
    with decode.faults.held("forward"):
        check_error(*await machine.send(PATH, ASK), 504, "engine_deadline")
    await soon(machine.proxy.until_idle())
    await machine.unharmed(*pair)
    assert decode.state()["finished"] <= 1


@pytest.mark.settings(decode_timeout=0.5)
async def test_the_deadline_of_decode_is_about_silence_not_about_length(machine, pair) -> None:
    decode = pair[1]
    decode.faults.hold("schedule")
    loop = asyncio.get_running_loop()
    begun = loop.time()
    # A token every third of the deadline, for more than two deadlines.
    for step in range(8):
        loop.call_at(begun + 0.15 * step, decode.faults.step)
    async with machine.http.post(machine.proxy.url + PATH, json={**ASK, "stream": True}) as answer:
        assert answer.status == 200
        assert b"[DONE]" in await soon(answer.read())
    assert loop.time() - begun > 1.0


async def test_the_first_request_of_a_pair_is_slow_and_that_is_no_failure(machine) -> None:
    """NCCL's communicator: about 1.1 s on each leg, measured; here 0.3 s."""
    await machine.pair(communicator_seconds=0.3)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    # A second request that comes meanwhile waits for the same communicator.
    await asyncio.gather(machine.check_right(), machine.check_right("/v1/chat/completions"))
    assert loop.time() - begun >= 0.6
    await machine.check_right()
    _, stats = await machine.get("/stats")
    assert {(i["breaker"], i["failures_total"]) for i in stats["instances"]} == {("closed", 0)}
    assert machine.proxy.services.stats.failovers == 0


@pytest.mark.settings(prefill_timeout=0.2)
async def test_a_first_request_that_is_too_slow_is_drained_and_the_next_one_is_quick(machine) -> None:
    pair = await machine.pair(communicator_seconds=0.3)
    check_error(*await machine.send(PATH, ASK), 504, "engine_deadline")
    await soon(machine.proxy.until_idle())
    assert machine.proxy.services.stats.kv_releases.done == 1
    lift_prefill_timeout(machine.proxy)
    await machine.check_right()
    await machine.unharmed(*pair)
