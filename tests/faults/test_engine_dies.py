"""An engine dies: noticed when its sockets close, long before pings or probes tell, or by its /health after a 500."""

import asyncio

import pytest

from disagg_proxy.cluster.instance import Instance, State
from tests.conftest import soon
from tests.faults.conftest import ids
from tests.simulated import REQUESTS, check_error

PATH = "/v1/completions"
ASK = REQUESTS[PATH]


@pytest.mark.settings(probe_interval=60.0, instance_expiry=60.0)
@pytest.mark.parametrize("victim", [0, 1], ids=["prefill", "decode"])
async def test_a_killed_engine_is_out_at_once_and_nothing_is_sent_towards_it(machine, pair, victim: int) -> None:
    await machine.kill(pair[victim])
    other = pair[1 - victim]
    status, _, body = await machine.post(PATH, ASK)
    assert (status, body["error"]["code"]) == (503, "no_pair")
    assert not other.received(PATH)


@pytest.mark.settings(probe_interval=60.0, instance_expiry=60.0)
async def test_the_others_go_on(machine, pair) -> None:
    await machine.pair()
    await machine.kill(pair[0])
    for _ in range(4):
        await machine.check_right()
    assert not pair[0].received(PATH)


@pytest.mark.settings(probe_interval=60.0, instance_expiry=60.0)
async def test_a_server_that_closes_idle_connections_stays_in_and_loses_its_lifeline(
    machine, pair, monkeypatch
) -> None:
    instance = machine.proxy.instance(pair[0].http_address)
    liveness = machine.proxy.services.discovery._liveness
    closed = asyncio.Event()

    async def closes(_: Instance) -> None:
        await closed.wait()

    monkeypatch.setattr(liveness, "_until_closed", closes)
    # The connection that is held already is the last one of the old kind.
    held = liveness._held[instance]
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    liveness._held.pop(instance, None)
    liveness._on_change(instance)
    closed.set()
    await soon(liveness._held[instance])
    assert instance not in liveness._held
    assert (instance.state, instance.epoch) == (State.READY, 3), instance.reason
    await machine.check_right()


@pytest.mark.settings(probe_interval=0.05)
@pytest.mark.parametrize("leg", [0, 1], ids=["prefill", "decode"])
async def test_a_dead_engine_is_found_out_by_its_health(machine, pair, leg: int) -> None:
    engine = pair[leg]
    async with machine.http.post(f"http://{engine.http_address}{PATH}", json=ASK) as direct:
        assert direct.status == 500, "a request without addresses in its id kills an engine"
    await soon(machine.proxy.until_state(engine.http_address, State.PROBING))
    assert "/health answers 503" in machine.proxy.instance(engine.http_address).reason
    check_error(*await machine.send(PATH, ASK), 503, "no_pair")


@pytest.mark.settings(probe_interval=60.0)
async def test_a_prefill_that_has_died_is_502_until_it_is_found_out(machine, pair) -> None:
    prefill, decode = pair
    async with machine.http.post(f"http://{prefill.http_address}{PATH}", json=ASK) as direct:
        assert direct.status == 500
    assert "EngineCore" in check_error(*await machine.send(PATH, ASK), 502, "engine_failed")
    assert not decode.received(PATH)


async def test_a_dead_engine_is_out_after_its_first_500(machine, pair) -> None:
    pair[0].faults.health_status = 503
    pair[0].faults.fail_next(500, b"EngineDeadError", path=PATH)
    status, _, _ = await machine.post(PATH, ASK)
    assert status in (502, 503)
    await soon(machine.proxy.until_state(pair[0].http_address, State.PROBING))


@pytest.mark.settings(probe_interval=60.0)
@pytest.mark.parametrize("role", [0, 1], ids=["prefill", "decode"])
async def test_an_instance_that_was_killed_is_out_when_it_refuses_and_back_when_it_is_back(machine, role) -> None:
    engines = list(await machine.pair())
    spare = await machine.pair()
    engine = engines[role]
    await machine.kill(engine)
    for _ in range(4):
        await machine.check_right()
    assert not engine.received(PATH) and len(spare[role].received(PATH)) == 4
    await machine.restart(engine)
    assert machine.proxy.instance(engine.http_address).epoch == 1


@pytest.mark.settings(probe_interval=0.1, prefill_timeout=0.5)
async def test_a_decode_killed_while_prefill_sends_is_504_and_the_pair_works_when_both_are_back(machine, pair) -> None:
    prefill, decode = pair
    await machine.check_right()
    prefill.faults.hold("forward")
    request = asyncio.ensure_future(machine.send(PATH, ASK))
    await soon(prefill.wait_until(lambda state: state["held_at"] == "forward"))
    await machine.kill(decode)
    prefill.faults.release()
    # The sender waits for the dead one, and prefill's forward pass for its sender; /health stays 200.
    await soon(prefill.wait_until(lambda state: state["stalled_on"] is not None))
    check_error(*await soon(request), 504, "engine_deadline")

    check_error(*await machine.send(PATH, ASK), 503, "no_pair")

    # What the old prefill still has to send would end the listener of the new decode: both down, then both up.
    await machine.kill(prefill)
    await soon(machine.proxy.until_idle())
    again = [await machine.restart(engine) for engine in (decode, prefill)]
    await machine.check_right()
    assert ids(again[0]) == ids(again[1]) and len(ids(again[0])) == 1
    assert machine.proxy.services.stats.kv_releases.started == 0
    await machine.unharmed(*again)


@pytest.mark.settings(probe_interval=0.1, freeze_after_min=0.4, freeze_after_max=0.4)
async def test_requests_leave_a_prefill_that_freezes_on_a_dead_decode(machine, four) -> None:
    prefills, decodes = four
    prefills[0].faults.hold("forward")
    requests = [asyncio.ensure_future(machine.check_right()) for _ in range(8)]
    await soon(prefills[0].wait_until(lambda state: state["held_at"] == "forward"))
    while sum(request.done() for request in requests) + len(ids(prefills[0])) < 8:
        await asyncio.sleep(0)
    sent_to = next(decode for decode in decodes if decode.kv_address in ids(prefills[0])[0].partition("___decode")[2])
    await machine.kill(sent_to)
    prefills[0].faults.release()
    await soon(asyncio.gather(*requests))
    assert prefills[0].state()["stalled_on"] is not None
    await soon(machine.proxy.until(lambda: machine.proxy.instance(prefills[0].http_address).restart_wanted))
    shown = (await machine.get("/stats"))[1]["instances"][0]
    assert (shown["state"], shown["restart_wanted"]) == ("frozen", True)
    assert len(set(ids(*decodes))) == len(ids(*decodes)), "no id is decoded twice"
    await machine.kill(prefills[0])
    await soon(machine.proxy.until_idle())
    assert machine.proxy.services.stats.kv_releases.started == 0, "what it still had to send is gone with it"
    await machine.unharmed(prefills[1], *(decode for decode in decodes if decode is not sent_to))


@pytest.mark.settings(probe_interval=0.1, freeze_after_min=0.4, freeze_after_max=0.4)
async def test_nobody_waits_for_ever_when_every_prefill_freezes_on_a_dead_decode(machine, pair) -> None:
    prefills, decode = [pair[0], await machine.engine("prefill")], pair[1]
    await soon(machine.proxy.until_pairs(2))
    for prefill in prefills:
        prefill.faults.hold("forward")
    requests = [asyncio.ensure_future(machine.send(PATH, ASK)) for _ in range(6)]
    for prefill in prefills:
        await soon(prefill.wait_until(lambda state: state["held_at"] == "forward"))
    spare = await machine.engine("decode")
    await soon(machine.proxy.until_state(spare.http_address, State.READY))
    await machine.kill(decode)
    for prefill in prefills:
        prefill.faults.release()
    answers = await soon(asyncio.gather(*requests))
    assert {check_error(*answer, 504, "engine_frozen") for answer in answers} == {"The prefill instance is stalled."}
    status, _, body = await machine.post(PATH, ASK)
    assert status == 503 and "stalled" in body["error"]["message"]
    for prefill in prefills:
        await machine.kill(prefill)
        await machine.restart(prefill)
    await machine.check_right()
    await machine.unharmed(spare)


@pytest.mark.settings(probe_interval=60.0)
@pytest.mark.parametrize("point", ["schedule", "answer"], ids=["before it sent", "after it sent"])
async def test_a_prefill_killed_before_its_answer_is_502_and_decode_is_left_alone(machine, pair, point: str) -> None:
    prefill, decode = pair
    with prefill.faults.held(point):
        request = asyncio.ensure_future(machine.send(PATH, ASK))
        await soon(prefill.wait_until(lambda state: state["held_at"] == point))
        if point == "answer":
            await soon(decode.wait_until(lambda state: state["kv_received"] == decode.config.kv_layers))
        await machine.kill(prefill)
    assert (await soon(request))[0] == 502
    await soon(machine.proxy.until_idle())
    assert not decode.received(PATH) and machine.proxy.services.stats.kv_releases.started == 0
    # Nobody can know what it had sent. KV that is whole stays; a decode of KV that is not would wait for ever.
    assert list(decode.state()["kv_waiting"]) == [f"cmpl-{id}-0" for id in ids(prefill) if point == "answer"]
    await machine.restart(prefill)
    await machine.check_right()
