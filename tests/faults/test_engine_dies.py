"""A process that dies is noticed when its sockets close, long before pings or probes tell."""

import asyncio

import pytest

from disagg_proxy.cluster.instance import Instance, State
from tests.conftest import soon

COMPLETIONS = "/v1/completions"
ASK = {"prompt": "San Francisco is a", "max_tokens": 3}


@pytest.mark.settings(probe_interval=60.0, instance_expiry=60.0)
@pytest.mark.parametrize("victim", [0, 1], ids=["prefill", "decode"])
async def test_a_killed_engine_is_out_at_once_and_nothing_is_sent_towards_it(machine, pair, victim: int) -> None:
    await pair[victim].kill()
    await soon(machine.proxy.until_state(pair[victim].http_address, State.PROBING))
    other = pair[1 - victim]
    status, _, body = await machine.post(COMPLETIONS, ASK)
    assert (status, body["error"]["code"]) == (503, "no_pair")
    assert not other.received(COMPLETIONS)


@pytest.mark.settings(probe_interval=60.0, instance_expiry=60.0)
async def test_the_others_go_on(machine, pair) -> None:
    await machine.pair()
    await pair[0].kill()
    await soon(machine.proxy.until_state(pair[0].http_address, State.PROBING))
    for _ in range(4):
        status, _, _ = await machine.post(COMPLETIONS, ASK)
        assert status == 200
    assert not pair[0].received(COMPLETIONS)


@pytest.mark.settings(probe_interval=60.0, instance_expiry=60.0)
async def test_an_engine_that_comes_back_counts_as_another_process(machine, pair) -> None:
    prefill = pair[0]
    await prefill.kill()
    await soon(machine.proxy.until_state(prefill.http_address, State.PROBING))
    again = prefill.restarted()
    await again.start()
    try:
        await soon(machine.proxy.until_state(prefill.http_address, State.READY))
        assert machine.proxy.instance(prefill.http_address).epoch == 1
        status, _, _ = await machine.post(COMPLETIONS, ASK)
        assert status == 200
    finally:
        await again.stop()


@pytest.mark.settings(probe_interval=60.0, instance_expiry=60.0)
async def test_a_server_that_closes_idle_connections_stays_in_and_loses_its_lifeline(
    machine, pair, monkeypatch
) -> None:
    instance = machine.proxy.instance(pair[0].http_address)
    lifelines = machine.proxy.services.discovery._lifelines
    closed = asyncio.Event()

    async def closes(_: Instance) -> None:
        await closed.wait()

    monkeypatch.setattr(lifelines, "_until_closed", closes)
    # The connection that is held already is the last one of the old kind.
    held = lifelines._held[instance]
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    lifelines._held.pop(instance, None)
    lifelines._on_change(instance)
    closed.set()
    await soon(lifelines._held[instance])
    assert instance not in lifelines._held
    assert (instance.state, instance.epoch) == (State.READY, 3), instance.reason
    status, _, _ = await machine.post(COMPLETIONS, ASK)
    assert status == 200
