"""An engine that keeps failing is left alone for a while, then one request decides; 4xx and 500s, which a client can
bring about, are not counted."""

import pytest

from disagg_proxy.cluster import circuit_breaker
from disagg_proxy.cluster.circuit_breaker import FAILURES_TO_OPEN
from disagg_proxy.page.verdict import verdict
from tests.faults.conftest import in_turn
from tests.simulated import REQUESTS

PATH = "/v1/completions"
ASK = REQUESTS[PATH]


@in_turn
async def test_a_clients_own_mistake_is_neither_retried_nor_held_against_anyone(machine, four) -> None:
    prefills, _decodes = four
    for _ in range(2 * FAILURES_TO_OPEN + 2):
        status, _, _ = await machine.post(PATH, {**ASK, "temperature": -1})
        assert status == 400
    assert sum(len(prefill.received(PATH)) for prefill in prefills) == 2 * FAILURES_TO_OPEN + 2
    _, stats = await machine.get("/stats")
    assert {(i["breaker"], i["failures_total"]) for i in stats["instances"]} == {("closed", 0)}


@in_turn
@pytest.mark.parametrize("how", ["5xx", "reset"])
async def test_a_prefill_that_keeps_failing_is_left_alone(machine, four, how: str) -> None:
    prefills, _ = four
    if how == "5xx":
        prefills[0].faults.fail_next(502, b"", path=PATH, times=100)
    else:
        prefills[0].faults.reset_next(path=PATH, times=100)
    for _ in range(3 * FAILURES_TO_OPEN):
        await machine.check_right()
    assert machine.proxy.instance(prefills[0].http_address).failures_total == FAILURES_TO_OPEN
    _, stats = await machine.get("/stats")
    assert [i["breaker"] for i in stats["instances"]] == ["open", "closed", "closed", "closed"]


async def test_a_pair_that_is_left_alone_is_503_with_the_reason(machine, pair) -> None:
    pair[0].faults.fail_next(502, b"", path=PATH, times=100)
    for _ in range(FAILURES_TO_OPEN):
        status, _, _ = await machine.post(PATH, ASK)
        assert status == 502
    status, headers, body = await machine.post(PATH, ASK)
    assert status == 503 and "every prefill instance keeps failing" in body["error"]["message"]
    assert int(headers["Retry-After"]) >= 1


@pytest.mark.parametrize("role", [0, 1], ids=["prefill", "decode"])
async def test_health_stats_metrics_and_page_say_that_nothing_can_be_served(machine, pair, monkeypatch, role) -> None:
    registry, failing = machine.proxy.services.registry, machine.proxy.instance(pair[role].http_address)
    later = registry.now() + 3600.0
    for _ in range(FAILURES_TO_OPEN):
        failing.breaker.record_failure(registry.now())
    status, health = await machine.get("/health")
    name = failing.role.value
    assert (status, health["status"], health["pairs"], health[name]["ready"]) == (503, "unavailable", 0, 0)
    assert health["missing"] == [f"every {name} instance keeps failing and is ejected for a while (circuit breaker)"]
    assert (await machine.get("/stats"))[1]["health"] == health
    async with machine.http.get(f"{machine.proxy.url}/metrics") as answer:
        assert "disagg_proxy_pairs_ready 0.0" in await answer.text()
    shown = {**await machine.proxy.services.page_view(), "health": health}
    assert (verdict(shown)["level"], verdict(shown)["head"]["key"]) == ("bad", f"head_none_able_{name}")
    # Half-open: the next request decides, so a balancer has to send it.
    monkeypatch.setattr(registry, "_clock", lambda: later)
    assert (await machine.get("/health"))[0] == 200


async def test_500s_that_a_client_may_have_caused_leave_nobody_alone(machine, pair) -> None:
    pair[0].faults.fail_next(500, b"TypeError", path=PATH, times=3 * FAILURES_TO_OPEN)
    for _ in range(3 * FAILURES_TO_OPEN):
        status, _, _ = await machine.post(PATH, ASK)
        assert status == 502
    await machine.check_right()


@pytest.mark.parametrize("recovers", [True, False])
async def test_after_the_pause_one_request_decides(machine, pair, monkeypatch, recovers: bool) -> None:
    prefill = pair[0]
    now = [0.0]
    monkeypatch.setattr(machine.proxy.services.registry, "_clock", lambda: now[0])
    prefill.faults.fail_next(502, b"", path=PATH, times=FAILURES_TO_OPEN + (not recovers))
    for _ in range(FAILURES_TO_OPEN):
        assert (await machine.post(PATH, ASK))[0] == 502
    assert await shown(machine) == "open"
    now[0] += circuit_breaker.MIN_OPEN_SECONDS
    assert await shown(machine) == "half-open"
    if recovers:
        await machine.check_right()
        assert await shown(machine) == "closed"
        return
    assert (await machine.post(PATH, ASK))[0] == 502
    now[0] += circuit_breaker.MIN_OPEN_SECONDS
    assert await shown(machine) == "open", "the pause is doubled"
    assert (await machine.post(PATH, ASK))[0] == 503
    assert len(prefill.received(PATH)) == FAILURES_TO_OPEN + 1


async def shown(machine) -> str:
    """What /stats says of the first prefill's breaker."""
    return (await machine.get("/stats"))[1]["instances"][0]["breaker"]
