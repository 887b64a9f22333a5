"""Several proxies over the same engines, of which the engines ping one."""

from __future__ import annotations

import msgpack

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Role, State
from disagg_proxy.discovery.announcement import decode, passed_on
from disagg_proxy.discovery.forward import Forwarder
from disagg_sim import expected_text
from tests.cluster.conftest import World
from tests.conftest import running_proxy, soon
from tests.workers.conftest import ASK, Door

PING = {"type": "P", "http_address": "127.0.0.1:1", "zmq_address": "127.0.0.1:2"}


def test_what_is_passed_on_is_the_same_but_for_the_mark() -> None:
    announcement = decode([msgpack.packb({**PING, "boot_id": "b", "more": [1]})])
    again = decode([passed_on(announcement)])
    assert not announcement.passed_on and again.passed_on
    assert (again.role, again.http, again.kv, again.boot) == (
        announcement.role,
        announcement.http,
        announcement.kv,
        "b",
    )


async def test_both_serve_and_what_was_passed_on_goes_no_further(engines) -> None:
    async with running_proxy() as first, running_proxy() as second:
        # Each passes on to the other.
        for one, other in ((first, second), (second, first)):
            forwarder = Forwarder([parse_address(other.zmq)])
            forwarder.open()
            one.services.discovery._forwarder.close()
            one.services.discovery._forwarder = forwarder
        pair = await engines(first.zmq)
        for proxy in (first, second):
            for engine in pair:
                await soon(proxy.until_state(engine.http_address, State.READY))
            door = Door(proxy.url)
            status, body = await door.ask()
            assert (status, body["choices"][0]["text"]) == (200, expected_text(ASK["prompt"], 8))
            await door.session.close()
        sent = sum(engine.state()["pings"] for engine in pair)
        assert first.services.discovery.listener.traffic.messages <= sent, "nothing comes back"
        assert second.services.registry.other_proxies
        assert not first.services.registry.other_proxies


async def test_a_proxy_of_several_workers_passes_on_to_another(fleet, engines) -> None:
    async with running_proxy() as second:
        first = await fleet(2, FORWARD_REGISTRATIONS=second.zmq)
        pair = await engines(first.zmq)
        for engine in pair:
            await first.until_known(engine)
            await soon(second.until_state(engine.http_address, State.READY))
        for url in (first.url, second.url):
            door = Door(url)
            assert (await door.ask())[0] == 200
            await door.session.close()


def test_after_a_decodes_end_other_proxies_prefills_are_kept_from_the_next_one() -> None:
    world = World()
    registry = world.registry
    prefill, decode = world.ready(Role.PREFILL, 1), world.ready(Role.DECODE, 2)
    registry.process_ended(decode)
    assert registry.kv_compatibility.compatible(prefill, decode), "nothing was sent, by nobody else"
    registry.other_proxies = True
    registry.process_ended(decode)
    assert not registry.kv_compatibility.compatible(prefill, decode)
    registry.process_ended(prefill)
    assert registry.kv_compatibility.compatible(prefill, decode), "a new process knows nobody"
