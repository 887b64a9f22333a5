"""ALLOW_REGISTER=proven with several workers: the supervisor proves an announcement once, for all of them."""

from __future__ import annotations


async def test_a_proven_engine_is_known_to_all_and_another_to_none(fleet, engines) -> None:
    proxy = await fleet(2, ALLOW_REGISTER="proven", DISAGG_KV_SECRET="s")
    for engine in await engines(proxy.zmq, connector="disagg_kv", kv_secret="s"):
        await proxy.until_known(engine)
    forged, _ = await engines(proxy.zmq, connector="disagg_kv", kv_secret="other")
    await proxy.until_written("Dropped an unproven registration from 127.0.0.1: .*the shared secret differs")
    for door in await proxy.doors():
        assert (await door.ask())[0] == 200
        known = {one["http_address"] for one in (await door.get("/stats"))["instances"]}
        assert len(known) == 2 and forged.http_address not in known
