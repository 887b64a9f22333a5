"""One instance out for maintenance and back, by an operator's request, without a request that fails."""

import asyncio
import hmac
from typing import Any

import pytest

from disagg_proxy.cluster.instance import State
from disagg_sim import SimEngine, expected_text
from tests.conftest import soon
from tests.e2e.test_status import scrape
from tests.simulated import REQUESTS, events, text_of_events

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
TEXT = expected_text(ASK["prompt"], ASK["max_tokens"])
STREAM = {**ASK, "stream": True}
KEY, ADMIN = "sk-client", "sk-admin"

with_admin = pytest.mark.settings(admin_key=ADMIN)
with_both = pytest.mark.settings(admin_key=ADMIN, api_key=KEY)


class Operator:
    """Requests with the admin key."""

    def __init__(self, machine) -> None:
        self._machine = machine

    async def send(self, method: str, path: str, key: str = ADMIN, **query: Any) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = self._machine.proxy.url + path
        async with self._machine.http.request(method, url, headers=headers, params=query) as answer:
            return answer.status, await answer.json()

    async def drain(self, engine: SimEngine, **query: Any) -> dict[str, Any]:
        status, body = await self.send("POST", "/admin/drain", instance=engine.http_address, **query)
        assert (status, body["http_address"], body["draining"]) == (200, engine.http_address, True)
        return body

    async def undrain(self, engine: SimEngine) -> dict[str, Any]:
        status, body = await self.send("POST", "/admin/undrain", instance=engine.http_address)
        assert (status, body["http_address"], body["draining"]) == (200, engine.http_address, False)
        return body

    async def shown(self, engine: SimEngine) -> dict[str, Any]:
        _, body = await self.send("GET", "/admin/instances")
        return next(one for one in body["instances"] if one["http_address"] == engine.http_address)


@pytest.fixture
def operator(machine) -> Operator:
    return Operator(machine)


def ask(machine, body: dict[str, Any] = ASK) -> "asyncio.Task[tuple[int, Any, bytes]]":
    return asyncio.create_task(machine.send(PATH, body))


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0)


def idle(machine, engine: SimEngine) -> bool:
    return machine.proxy.instance(engine.http_address).idle


async def served(machine, times: int = 1) -> None:
    for _ in range(times):
        status, _, body = await machine.post(PATH, ASK)
        assert (status, body["choices"][0]["text"]) == (200, TEXT)


# -- who may


@with_both
async def test_the_admin_key_opens_the_operators_routes_alone(machine, pair, operator: Operator) -> None:
    where = {"instance": pair[1].http_address}
    for method, path in (("POST", "/admin/drain"), ("POST", "/admin/undrain"), ("GET", "/admin/instances")):
        for key in ("", KEY, ADMIN + "x", ADMIN[:-1]):
            status, body = await operator.send(method, path, key, **where)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert "admin key" in body["error"]["message"]
        assert (await operator.send(method, path, **where))[0] == 200
    for method, path in (("GET", "/stats"), ("GET", "/metrics"), ("POST", PATH), ("GET", "/admin")):
        assert (await operator.send(method, path))[0] == 401


@with_both
@pytest.mark.parametrize(
    "path", ["//admin/drain", "/admin//drain", "/admin/drain/", "/%61dmin/drain", "/Admin/drain", "/v1/../admin/drain"]
)
async def test_no_other_spelling_of_the_path_does_without_the_key(machine, pair, dial, path: str) -> None:
    for key in ("", KEY):
        wire = await dial(machine.proxy.url)
        wire.post(f"{path}?instance={pair[1].http_address}", {}, f"Authorization: Bearer {key}")
        assert (await wire.head())[0] in (308, 401, 404)
    assert not machine.proxy.instance(pair[1].http_address).draining


@with_admin
async def test_the_key_is_compared_in_constant_time(machine, operator: Operator, monkeypatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    assert (await operator.send("GET", "/admin/instances", "guess"))[0] == 401
    assert (b"guess", ADMIN.encode()) in compared


@with_admin
async def test_the_rest_needs_no_key_when_only_the_operators_routes_have_one(machine, pair) -> None:
    await served(machine)
    assert (await machine.get("/stats"))[0] == 200


@pytest.mark.parametrize("path", ["/admin/drain", "/admin/undrain", "/admin/instances", "/admin/x"])
async def test_without_an_admin_key_they_do_not_exist(machine, pair, operator: Operator, path: str) -> None:
    unknown = await operator.send("POST", "/nothing")
    for method in ("GET", "POST"):
        assert await operator.send(method, path, instance=pair[1].http_address) == unknown
    assert unknown[0] == 404 and not machine.proxy.instance(pair[1].http_address).draining


@with_admin
async def test_mistakes_are_named(machine, pair, operator: Operator) -> None:
    prefill, decode = (engine.http_address for engine in pair)
    for path in ("/admin/drain", "/admin/undrain"):
        for query in ({}, {"instance": ""}, {"Instance": decode}):
            status, body = await operator.send("POST", path, **query)
            assert (status, body["error"]["param"]) == (400, "instance")
            assert body["error"]["type"] == "invalid_request_error" and "HOST:PORT" in body["error"]["message"]
        for unknown in ("127.0.0.1:1", "127.0.0.1", "http://" + decode, "x" * 5000):
            status, body = await operator.send("POST", path, instance=unknown)
            assert (status, body["error"]["code"]) == (404, "instance_not_found")
            assert f"{prefill}, {decode}" in body["error"]["message"]
        status, body = await operator.send("GET", path, instance=decode)
        assert (status, body["error"]["code"]) == (405, "method_not_allowed")
    status, body = await operator.send("POST", f"/admin/drain?instance={prefill}&instance={decode}")
    assert (status, body["error"]["param"]) == (400, "instance")
    for wait in ("soon", "-1", "nan", "inf", "1e9", ""):
        status, body = await operator.send("POST", "/admin/drain", instance=decode, wait=wait)
        assert (status, body["error"]["param"]) == (400, "wait"), wait
    assert not any(instance.draining for instance in machine.proxy.services.registry.instances())
    assert (await operator.send("POST", "/admin/instances"))[0] == 405
    assert (await operator.send("GET", "/admin/nothing"))[0] == 404


# -- what it does


@with_admin
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_what_runs_on_it_ends_well_and_the_rest_goes_elsewhere(machine, operator: Operator, role: str) -> None:
    a, b = await machine.pair(), await machine.pair()
    side = 0 if role == "prefill" else 1
    for pair in (a, b):
        pair[side].faults.hold("schedule")
    running = [ask(machine, {**STREAM, "max_tokens": 30}) for _ in range(4)]
    for pair in (a, b):
        await soon(pair[side].wait_until(lambda state: state["running"] + state["waiting"] == 2))
    body = await operator.drain(a[side])
    assert (body["idle"], body["in_flight"], body["state"]) == (False, 2, "ready")
    assert body["reason"].startswith("drained for maintenance; serves sim-model")
    b[side].faults.release()
    await served(machine, 4)
    assert len(a[side].received(PATH)) == 2
    waiting = asyncio.create_task(operator.drain(a[side], wait=60))
    await soon(until(lambda: machine.proxy.instance(a[side].http_address).in_flight == 2))
    a[side].faults.release()
    assert (await soon(waiting))["idle"]
    for one in running:
        status, _, raw = await soon(one)
        assert status == 200
        assert text_of_events(events(raw)) == expected_text(ASK["prompt"], 30)
    assert len(a[side].received(PATH)) == 2
    assert (await operator.undrain(a[side]))["reason"].startswith("serves sim-model")
    await served(machine, 4)
    assert len(a[side].received(PATH)) > 2
    await soon(machine.proxy.until_idle())
    await machine.unharmed(*a, *b)
    assert machine.proxy.services.stats.outcomes == {"ok": 12}


@with_admin
async def test_a_prefill_is_idle_only_when_decode_has_loaded_what_it_sent(machine, pair, operator: Operator) -> None:
    prefill, decode = pair
    decode.faults.hold("schedule")
    request = ask(machine, STREAM)
    await soon(until(lambda: decode.received(PATH)))
    body = await operator.drain(prefill, wait=0.01)
    assert (body["in_flight"], body["kv_waiting"], body["idle"]) == (0, 1, False)
    waiting = asyncio.create_task(operator.drain(prefill, wait=60))
    decode.faults.release()
    assert (await soon(waiting))["idle"] and (await soon(request))[0] == 200


@with_admin
async def test_kv_that_a_client_left_behind_is_freed_on_a_drained_decode(machine, pair, dial, operator) -> None:
    prefill, decode = pair
    client = await dial(machine.proxy.url)
    with prefill.faults.held("answer"):
        client.post(PATH, STREAM)
        await soon(prefill.wait_until(lambda state: state["held_at"] == "answer"))
        await machine.left(client)
        assert not (await operator.drain(decode))["idle"]
        waiting = asyncio.create_task(operator.drain(decode, wait=60))
    assert (await soon(waiting))["idle"]
    assert machine.proxy.services.stats.kv_releases.done == 1
    await machine.unharmed(*pair)


@with_admin
async def test_requests_that_concern_no_pair_count_too(machine, pair, operator: Operator) -> None:
    prefill, decode = pair
    await operator.drain(decode)
    prefill.faults.hang_next(path="/tokenize")
    asked = asyncio.create_task(machine.send("/tokenize", {"prompt": "x"}))
    await soon(until(lambda: prefill.received("/tokenize")))
    assert not (await operator.drain(prefill))["idle"]
    waiting = asyncio.create_task(operator.drain(prefill, wait=60))
    asked.cancel()
    assert (await soon(waiting))["idle"]
    assert not decode.received("/tokenize")


@with_admin
async def test_a_wait_ends_with_an_undrain_and_when_its_time_is_over(machine, pair, operator: Operator) -> None:
    pair[1].faults.hold("schedule")
    request = ask(machine)
    await soon(until(lambda: pair[1].received(PATH)))
    assert not (await operator.drain(pair[1], wait=0.01))["idle"]
    drained = asyncio.Event()
    machine.proxy.services.registry.watch(changed=lambda instance: drained.set())
    waiting = asyncio.create_task(operator.send("POST", "/admin/drain", instance=pair[1].http_address, wait=60))
    await soon(drained.wait())
    await operator.undrain(pair[1])
    status, body = await soon(waiting)
    assert (status, body["draining"], body["idle"]) == (200, False, False)
    pair[1].faults.release()
    assert (await soon(request))[0] == 200


@with_admin
async def test_a_wait_does_not_hold_up_the_shutdown(machine, pair, operator: Operator) -> None:
    pair[1].faults.hold("schedule")
    request = ask(machine)
    await soon(until(lambda: pair[1].received(PATH)))
    waiting = asyncio.create_task(operator.drain(pair[1], wait=3600))
    await soon(until(lambda: machine.proxy.instance(pair[1].http_address).draining))
    machine.proxy.server.on_signal()
    assert not (await soon(waiting))["idle"]
    pair[1].faults.release()
    assert (await soon(request))[0] == 200


@with_admin
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_when_none_is_left_health_and_clients_are_told_why(machine, pair, operator: Operator, role: str) -> None:
    engine = pair[0 if role == "prefill" else 1]
    await operator.drain(engine)
    why = f"no {role} instance is ready (one is drained for maintenance)"
    status, health = await machine.get("/health")
    assert (status, health["status"], health["pairs"], health["missing"]) == (503, "unavailable", 0, [why])
    assert health[role] == {"ready": 0, "known": 1} and engine.http_address not in str(health)
    status, headers, body = await machine.post(PATH, ASK)
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "no_pair", "3")
    assert why in body["error"]["message"] and "127.0.0.1" not in body["error"]["message"]
    assert [one["id"] for one in (await machine.get("/v1/models"))[1]["data"]] == ["sim-model"]
    assert (await operator.shown(engine))["draining"] and (await machine.get("/stats"))[0] == 200
    where = f"{engine.http_address} {role}"
    found = await scrape(machine)
    assert (found[f"instance_ready {where}"], found[f"instance_draining {where}"]) == (0, 1)
    await operator.undrain(engine)
    assert (await machine.get("/health"))[0] == 200
    found = await scrape(machine)
    assert (found[f"instance_ready {where}"], found[f"instance_draining {where}"]) == (1, 0)
    await served(machine)


@pytest.mark.settings(admin_key=ADMIN, probe_interval=0.1)
async def test_it_stays_out_through_a_restart_until_it_is_undrained(machine, operator: Operator) -> None:
    a, b = await machine.pair(), await machine.pair()
    await operator.drain(a[0], wait=60)
    await a[0].stop()
    await soon(machine.proxy.until_state(a[0].http_address, State.PROBING))
    assert (await operator.shown(a[0]))["reason"].startswith("drained for maintenance; ")
    again = a[0].restarted()
    await again.start()
    machine.engines.append(again)
    await soon(machine.proxy.until_state(again.http_address, State.READY))
    shown = await operator.shown(again)
    assert (shown["draining"], shown["idle"], shown["state"]) == (True, True, "ready")
    await served(machine, 4)
    assert not again.received(PATH) and len(b[0].received(PATH)) == 4
    await operator.undrain(again)
    await served(machine, 4)
    assert again.received(PATH)


@pytest.mark.settings(admin_key=ADMIN, decode_max_in_flight=1)
async def test_those_that_wait_in_the_queue_are_served_after_the_undrain(machine, pair, operator: Operator) -> None:
    decode = pair[1]
    decode.faults.hold("schedule")
    first, queued = ask(machine), ask(machine)
    await soon(until(lambda: machine.proxy.services.admission_queue.waiting == 1))
    await operator.drain(decode)
    decode.faults.release()
    assert (await soon(first))[0] == 200
    assert (await soon(ask(machine)))[0] == 503, "a new one is told at once"
    assert (await operator.drain(decode, wait=60))["idle"] and not queued.done()
    await operator.undrain(decode)
    assert (await soon(queued))[0] == 200


@with_admin
async def test_every_instance_out_and_back_in_turn_under_load_fails_no_request(machine, operator: Operator) -> None:
    pairs = [await machine.pair(), await machine.pair()]
    over = False
    statuses: list[int] = []

    async def client(number: int) -> None:
        while not over:
            body = {**ASK, "prompt": f"{ASK['prompt']} {number}", "stream": bool(number % 2)}
            statuses.append((await machine.send(PATH, body))[0])

    clients = [asyncio.create_task(client(number)) for number in range(8)]
    for engine in (*pairs[0], *pairs[1]):
        assert (await soon(operator.drain(engine, wait=60)))["idle"]
        asked = len(engine.received(PATH))
        done = len(statuses)
        await soon(until(lambda done=done: len(statuses) > done + 16))
        assert len(engine.received(PATH)) == asked and idle(machine, engine)
        await operator.undrain(engine)
        await soon(until(lambda engine=engine, asked=asked: len(engine.received(PATH)) > asked))
    over = True
    await soon(asyncio.gather(*clients))
    assert set(statuses) == {200}
    await machine.unharmed(*pairs[0], *pairs[1])
