"""A decode that comes back on the same address freezes the prefills that knew the old one, so they are kept apart."""

import pytest

from disagg_proxy.cluster.instance import State
from tests.conftest import soon

COMPLETIONS = "/v1/completions"
ASK = {"prompt": "San Francisco is a", "max_tokens": 3}


@pytest.mark.settings(probe_interval=0.1)
async def test_until_they_were_restarted_too(machine, pair) -> None:
    prefill, decode = pair
    assert (await machine.post(COMPLETIONS, ASK))[0] == 200
    await decode.kill()
    await soon(machine.proxy.until_state(decode.http_address, State.PROBING))
    decode = decode.restarted()
    await decode.start()
    try:
        await soon(machine.proxy.until_state(decode.http_address, State.READY))
        status, _, body = await machine.post(COMPLETIONS, ASK)
        assert status == 503 and "restart the prefill instances" in body["error"]["message"]
        status, health = await machine.get("/health")
        assert status == 503 and "restart the prefill instances" in health["missing"][0]
        _, stats = await machine.get("/stats")
        assert stats["instances"][0]["cannot_exchange_with"] == [decode.http_address]
        assert len(prefill.received(COMPLETIONS)) == 1
        await prefill.kill()
        await soon(machine.proxy.until_state(prefill.http_address, State.PROBING))
        prefill = prefill.restarted()
        await prefill.start()
        await soon(machine.proxy.until_state(prefill.http_address, State.READY))
        assert (await machine.post(COMPLETIONS, ASK))[0] == 200
    finally:
        await prefill.stop()
        await decode.stop()


@pytest.mark.settings(probe_interval=0.1)
async def test_a_prefill_that_never_sent_to_the_old_one_serves(machine, pair) -> None:
    _, decode = pair
    await decode.kill()
    await soon(machine.proxy.until_state(decode.http_address, State.PROBING))
    decode = decode.restarted()
    await decode.start()
    try:
        await soon(machine.proxy.until_state(decode.http_address, State.READY))
        assert (await machine.post(COMPLETIONS, ASK))[0] == 200
    finally:
        await decode.stop()
