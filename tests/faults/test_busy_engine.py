"""An engine that says it is busy (429, 503; vLLM 0.33 with --max-num-queued-reqs) is healthy: another one is tried, and
without another one the client gets 503 with Retry-After, which both SDKs obey."""

import pytest

from disagg_proxy.cluster.circuit_breaker import FAILURES_TO_OPEN, BreakerState
from tests.conftest import soon
from tests.faults.conftest import in_turn
from tests.simulated import REQUESTS, RIGHT, check_error, text_of, text_of_events

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
BUSY = b'{"error": {"message": "The engine is currently busy.", "type": "Service Unavailable", "code": 503}}'

connectors = pytest.mark.parametrize("connector", ["p2p_nccl", "disagg_kv"])
roles = pytest.mark.parametrize("role", [0, 1], ids=["prefill", "decode"])
statuses = pytest.mark.parametrize("status", [429, 503])


def breakers(machine) -> set[tuple[BreakerState, int]]:
    registry = machine.proxy.services.registry
    return {(i.breaker.state(registry.now()), i.failures_total) for i in registry.instances()}


@connectors
@roles
@statuses
async def test_the_only_one_is_503_with_retry_after_and_stays_in_rotation(machine, connector, role, status) -> None:
    engines = await machine.pair(connector=connector)
    for number in range(FAILURES_TO_OPEN + 1):
        engines[role].faults.fail_next(status, BUSY, {"Retry-After": "7"} if number % 3 else {}, path=PATH)
        got, headers, raw = await soon(machine.send(PATH, {**ASK, "stream": number % 2 == 0}))
        check_error(got, headers, raw, 503, "engine_busy")
        assert headers["Retry-After"] == ("7" if number % 3 else "2")
        await soon(machine.proxy.until_idle())
    assert breakers(machine) == {(BreakerState.CLOSED, 0)}
    assert machine.proxy.services.stats.outcomes == {"unavailable": FAILURES_TO_OPEN + 1}
    shown = {i["http_address"]: i for i in (await machine.get("/stats"))[1]["instances"]}
    rejections = [(shown[e.http_address]["rejections_total"], shown[e.http_address]["busy"]) for e in engines]
    assert sorted(rejections) == [(0, False), (FAILURES_TO_OPEN + 1, True)]
    await machine.check_right()
    await soon(machine.proxy.until_idle())
    await machine.unharmed(*engines)


@in_turn
@connectors
@roles
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_another_one_serves(machine, connector, role, stream) -> None:
    pairs = [await machine.pair(connector=connector), await machine.pair(connector=connector)]
    busy = pairs[0][role]
    sent = -1
    while machine.proxy.services.stats.failovers <= FAILURES_TO_OPEN:
        if sent != (sent := len(busy.received(PATH))):
            busy.faults.fail_next(503, BUSY, path=PATH)
            # Its pause is over, so that it gets the next request too.
            machine.proxy.instance(busy.http_address).breaker._busy_until = 0.0
        if stream:
            assert text_of_events(await soon(machine.stream(PATH, ASK))) == RIGHT[PATH]
        else:
            assert text_of((await soon(machine.post(PATH, ASK)))[2]) == RIGHT[PATH]
    assert breakers(machine) == {(BreakerState.CLOSED, 0)}
    await soon(machine.proxy.until_idle())
    await machine.unharmed(*(engine for pair in pairs for engine in pair))


async def test_decodes_do_not_take_over_the_prompts_of_a_busy_prefill(machine) -> None:
    prefill, decode = await machine.pair(connector="disagg_kv")
    prefill.faults.fail_next(503, BUSY, path=PATH)
    check_error(*await soon(machine.send(PATH, ASK)), 503, "engine_busy")
    await soon(machine.proxy.until_idle())
    assert len(decode.received(PATH)) == 1 and decode.state()["aborted"] == 1, "it was sent with prefill's leg"


async def test_a_busy_answer_does_not_close_an_open_breaker(machine, pair, monkeypatch) -> None:
    registry = machine.proxy.services.registry
    instance = machine.proxy.instance(pair[0].http_address)
    pair[0].faults.fail_next(502, path=PATH, times=FAILURES_TO_OPEN)
    for _ in range(FAILURES_TO_OPEN):
        assert (await machine.post(PATH, ASK))[0] == 502
    later = registry.now() + 3600.0
    monkeypatch.setattr(registry, "_clock", lambda: later)
    pair[0].faults.fail_next(503, path=PATH)
    check_error(*await machine.send(PATH, ASK), 503, "engine_busy")
    assert instance.breaker.state(later) is BreakerState.HALF_OPEN and instance.breaker.permits(later)
    await machine.check_right()
    assert instance.breaker.state(later) is BreakerState.CLOSED and instance.failures_total == FAILURES_TO_OPEN


@statuses
async def test_one_engine_routes_try_the_others_then_say_503(machine, pair, status) -> None:
    for engine in pair:
        engine.faults.fail_next(status, BUSY, {"Retry-After": "7"}, path="/tokenize")
    got, headers, raw = await machine.send("/tokenize", {"prompt": "x"})
    check_error(got, headers, raw, 503, "engine_busy")
    assert headers["Retry-After"] == "7" and sum(len(engine.received("/tokenize")) for engine in pair) == 2
    pair[0].faults.fail_next(status, BUSY, path="/tokenize")
    for _ in range(2):
        assert (await machine.post("/tokenize", {"prompt": "x"}))[0] == 200


@connectors
@roles
async def test_health_is_503_while_every_instance_of_a_role_is_busy(machine, connector, role) -> None:
    engines = await machine.pair(connector=connector)
    engines[role].faults.fail_next(503, BUSY, path=PATH)
    check_error(*await soon(machine.send(PATH, ASK)), 503, "engine_busy")
    status, health = await machine.get("/health")
    name = ("prefill", "decode")[role]
    assert (status, health["pairs"]) == (503, 0) and health["missing"] == [f"every {name} instance is busy or ejected"]
    await soon(machine.proxy.until_idle())
    await machine.check_right()
    assert (await machine.get("/health"))[0] == 200, "it has served a request"


@in_turn
@connectors
@roles
async def test_one_that_said_it_is_busy_gets_no_requests_for_a_while(machine, connector, role, monkeypatch) -> None:
    pairs = [await machine.pair(connector=connector), await machine.pair(connector=connector)]
    registry, busy = machine.proxy.services.registry, pairs[0][role]
    machine.proxy.instance(busy.http_address).breaker.record_busy(registry.now() + 3600.0)
    for _ in range(4):
        await machine.check_right()
    assert not busy.received(PATH)
    later = registry.now() + 7200.0
    monkeypatch.setattr(registry, "_clock", lambda: later)
    for _ in range(4):
        await machine.check_right()
    assert busy.received(PATH)
