"""An engine comes back on its addresses: it is another process, without the KV and the peers of the one before."""

import asyncio

import msgpack
import pytest
import zmq
import zmq.asyncio

from disagg_proxy.cluster.circuit_breaker import FAILURES_TO_OPEN
from disagg_proxy.cluster.instance import State
from tests.conftest import soon
from tests.simulated import REQUESTS

PATH = "/v1/completions"
ASK = REQUESTS[PATH]


@pytest.mark.settings(probe_interval=0.1)
async def test_a_decode_that_is_back_gets_no_prefill_that_knew_the_old_one_until_that_is_new_too(machine, pair) -> None:
    prefill, decode = pair
    await machine.check_right()
    await machine.kill(decode)
    await machine.restart(decode)
    status, _, body = await machine.post(PATH, ASK)
    assert status == 503 and "restart the prefill instances" in body["error"]["message"]
    status, health = await machine.get("/health")
    assert status == 503 and "restart the prefill instances" in health["missing"][0]
    _, stats = await machine.get("/stats")
    assert stats["instances"][0]["cannot_exchange_with"] == [decode.http_address]
    assert len(prefill.received(PATH)) == 1
    await machine.kill(prefill)
    await machine.restart(prefill)
    await machine.check_right()


@pytest.mark.settings(probe_interval=0.1)
async def test_a_prefill_that_never_sent_to_the_old_decode_serves_the_new_one(machine, pair) -> None:
    await machine.kill(pair[1])
    await machine.restart(pair[1])
    await machine.check_right()


@pytest.mark.settings(probe_interval=60.0, instance_expiry=60.0)
async def test_an_engine_that_comes_back_counts_as_another_process(machine, pair) -> None:
    prefill = pair[0]
    await machine.kill(prefill)
    await machine.restart(prefill)
    assert machine.proxy.instance(prefill.http_address).epoch == 1
    await machine.check_right()


@pytest.mark.settings(probe_interval=0.05)
@pytest.mark.parametrize("role", [0, 1], ids=["prefill", "decode"])
async def test_an_engine_that_comes_back_gets_no_work_before_it_answers_probes(machine, pair, role: int) -> None:
    await machine.kill(pair[role])
    there = machine.proxy.instance(pair[role].http_address)
    heard = there.last_ping
    again = pair[role].restarted()
    again.faults.health_status = 503
    machine.engines.append(again)
    await again.start()
    while there.last_ping == heard or there.reason != "its /health answers 503":
        await asyncio.sleep(0)
    status, _, body = await machine.post(PATH, ASK)
    assert (status, body["error"]["code"]) == (503, "no_pair")
    assert not pair[1 - role].received(PATH) and not again.received(PATH)
    again.faults.health_status = None
    await soon(machine.proxy.until_state(again.http_address, State.READY))
    await machine.check_right()


@pytest.mark.settings(probe_interval=0.05, instance_expiry=0.7)
async def test_an_engine_whose_pings_are_back_gets_no_work_before_it_answers_probes(machine, pair) -> None:
    decode = pair[1]
    decode.faults.pings = False
    await soon(machine.proxy.until_state(decode.http_address, State.LOST))
    decode.faults.health_status = 503
    decode.faults.pings = True
    await soon(machine.proxy.until(lambda: machine.proxy.instance(decode.http_address).state is not State.LOST))
    assert machine.proxy.instance(decode.http_address).state is State.PROBING
    assert (await machine.post(PATH, ASK))[0] == 503
    decode.faults.health_status = None
    await soon(machine.proxy.until_state(decode.http_address, State.READY))
    await machine.check_right()


async def test_a_restarted_instance_is_heard_although_its_old_connection_lives(machine) -> None:
    """Half-open peers: the old process is gone, its TCP connection is not, and the identity is the same."""
    context = zmq.asyncio.Context()
    identity = b"127.0.0.1:21001"

    async def ping(http_port: int) -> zmq.asyncio.Socket:
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.IDENTITY, identity)
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(f"tcp://{machine.proxy.zmq}")
        address = f"127.0.0.1:{http_port}"
        await sock.send(msgpack.packb({"type": "P", "http_address": address, "zmq_address": f"127.0.0.1:{http_port}"}))
        await soon(machine.proxy.until(lambda: machine.proxy.knows(address)))
        return sock

    try:
        sockets = [await ping(port) for port in (1, 2, 3)]
    finally:
        context.destroy(linger=0)
    assert len(sockets) == 3


@pytest.mark.settings(probe_interval=0.05)
async def test_a_killed_prefill_works_again_as_soon_as_it_is_back(machine, pair) -> None:
    await machine.check_right()
    await machine.kill(pair[0])
    again = await machine.restart(pair[0])
    await machine.check_right()
    assert len(again.received(PATH)) == 1


@pytest.mark.settings(probe_interval=0.05)
async def test_an_instance_that_comes_back_with_another_model_serves_that_one(machine, pair) -> None:
    for engine in pair:
        await machine.kill(engine)
        await machine.restart(engine, models=("new", "alias"))
    assert [card["id"] for card in (await machine.get("/v1/models"))[1]["data"]] == ["new", "alias"]
    status, _, body = await machine.post(PATH, ASK)
    assert status == 404 and "new" in body["error"]["message"] and "alias" in body["error"]["message"]
    await machine.check_right(model="alias")


@pytest.mark.settings(probe_interval=0.05)
@pytest.mark.parametrize("leaves", [True, False], ids=["client gone", "client waits"])
async def test_a_restarted_decode_is_not_asked_for_kv_that_it_never_got(machine, pair, dial, leaves: bool) -> None:
    prefill, decode = pair
    client = await dial(machine.proxy.url)
    prefill.faults.hold("answer")
    client.post(PATH, ASK)
    await soon(prefill.wait_until(lambda state: state["held_at"] == "answer"))
    await soon(decode.wait_until(lambda state: state["kv_received"] == decode.config.kv_layers))
    if leaves:
        await machine.left(client)
    await machine.kill(decode)
    again = await machine.restart(decode)
    prefill.faults.release()
    if not leaves:
        status, _, body = await client.answer()
        assert status == 502 and b"went away during the prefill" in body
    await soon(machine.proxy.until_idle())
    assert not again.received(PATH), "it would wait for ever for KV that went with the old process"
    assert machine.proxy.services.stats.kv_releases.done == 0
    assert machine.proxy.instance(decode.http_address).in_flight == 0


async def test_streams_that_a_death_cuts_keep_nobody_from_the_next_process(machine, pair) -> None:
    _, decode = pair
    endless = {**ASK, "stream": True, "max_tokens": 5000, "ignore_eos": True}
    streams = [
        asyncio.ensure_future(machine.http.post(machine.proxy.url + PATH, json=endless))
        for _ in range(3 * FAILURES_TO_OPEN)
    ]
    answers = await soon(asyncio.gather(*streams))
    decode.faults.hold("answer")
    spare = await machine.engine("prefill")
    await soon(machine.proxy.until_state(spare.http_address, State.READY))
    await decode.kill()
    for answer in answers:
        answer.close()
    await soon(machine.proxy.until_state(decode.http_address, State.PROBING))
    await machine.restart(decode)
    await machine.check_right()
