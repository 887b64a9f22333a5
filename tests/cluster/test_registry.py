"""The life of an instance: announced, admitted, suspended, lost, forgotten, contradicted."""

from types import SimpleNamespace

import pytest

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Role, Source, State
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.unavailable import missing_roles
from disagg_proxy.config import StaticInstance
from disagg_proxy.connectors.disagg_kv import KIND as DISAGG_KV
from disagg_proxy.connectors.p2p_nccl import KIND as P2P
from disagg_proxy.errors import EngineUnreachable

P, D = Role.PREFILL, Role.DECODE


def test_a_ping_alone_does_not_admit_but_requests_a_probe(world) -> None:
    assert world.ping(P, 1) is None
    assert world.instance(1).state is State.PROBING
    assert world.probes == [world.instance(1)]
    assert world.registry.ready(P) == ()


def test_an_admitted_instance_serves_its_models(world) -> None:
    instance = world.ready(P, 1, "a", "b")
    assert world.registry.serving(P, "b") == (instance,)
    assert world.registry.serving(P, "c") == ()
    assert instance.default_model == "a"


def test_one_missing_ping_is_tolerated_three_are_not(world) -> None:
    instance = world.ready(P, 1)
    world.time += 6.1
    world.registry.expire()
    assert instance.state is State.READY
    world.time += 4
    world.registry.expire()
    assert instance.state is State.LOST
    assert world.registry.ready(P) == ()
    assert instance.reason == "no ping for 10 s"


def test_every_instance_expires_on_its_own(world) -> None:
    old = world.ready(P, 1)
    world.time += 5
    fresh = world.ready(P, 2)
    world.time += 6
    world.registry.expire()
    assert (old.state, fresh.state) == (State.LOST, State.READY)


def test_a_lost_instance_returns_as_the_same_process(world) -> None:
    instance = world.ready(P, 1)
    world.time += 11
    world.registry.expire()
    assert world.ready(P, 1) is instance
    assert instance.state is State.READY and (instance.epoch, instance.times_lost) == (0, 1)


def test_a_lost_instance_on_a_new_kv_port_is_a_new_one(world) -> None:
    old = world.ready(P, 1)
    world.time += 11
    world.registry.expire()
    assert world.ping(P, 1, 7777) is None
    assert world.instance(1) is not old and not world.registry.knows(old)


def test_a_lost_instance_is_forgotten_but_not_while_it_is_in_use(world) -> None:
    instance = world.ready(P, 1)
    instance.in_flight += 1
    world.time += 11
    world.registry.expire()
    world.time += 61
    world.registry.expire()
    assert world.registry.knows(instance)
    instance.in_flight -= 1
    world.registry.expire()
    assert not world.registry.knows(instance)


@pytest.mark.parametrize("wanted", [False, True])
def test_one_that_may_be_hung_is_remembered_longer(world, wanted: bool) -> None:
    """A supervisor must have time to see that its restart is requested."""
    instance = world.ready(Role.DECODE, 2)
    world.time += 10
    world.registry.expire()
    instance.probe_failures = 3
    if wanted:
        world.time += 20
        world.registry.request_restart(instance, "its process hangs")
    world.time += 629
    world.registry.expire()
    assert world.registry.knows(instance) and instance.restart_wanted is wanted
    world.time += 1
    world.registry.expire()
    assert not world.registry.knows(instance)


def test_a_lost_one_that_refuses_connections_is_forgotten_as_before(world) -> None:
    instance = world.ready(Role.DECODE, 2)
    world.time += 10
    world.registry.expire()
    instance.probe_failures = 3
    world.registry.suspend(instance, "its HTTP port refuses connections", gone=True)
    world.time += 60
    world.registry.expire()
    assert not world.registry.knows(instance)


def test_suspended_is_out_until_a_probe_admits_it_again_and_counts_as_another_process(world) -> None:
    instance = world.ready(D, 1)
    world.registry.connection_refused(instance, "refused")
    assert world.registry.ready(D) == () and instance.reason == "refused"
    assert world.probes.count(instance) == 2
    world.registry.admit(instance, {"m": {}})
    assert world.registry.ready(D) == (instance,)
    assert instance.epoch == 1


def test_a_conflicting_ping_does_not_replace_a_live_instance_but_has_it_probed(world) -> None:
    instance = world.ready(P, 1)
    for refusal in (world.ping(P, 1, 7777), world.ping(D, 1)):
        assert refusal is not None and "probed again" in refusal
    assert instance.kv.port == 1001 and instance.state is State.READY
    assert world.probes.count(instance) == 3


def test_a_restart_on_a_new_kv_port_gets_in_once_the_old_one_is_found_gone(world) -> None:
    instance = world.ready(P, 1)
    world.registry.connection_refused(instance, "refused")
    assert world.ping(P, 1, 7777) is None
    assert world.instance(1).kv.port == 7777
    assert world.instance(1) is not instance


def test_two_instances_cannot_share_a_kv_address(world) -> None:
    world.ready(P, 1)
    assert "belongs to" in world.ping(P, 2, 1001)


def test_a_static_instance_needs_no_pings(world) -> None:
    instance = world.registry.add_static(P, StaticInstance("127.0.0.1:1", "127.0.0.1:1001"), P2P)
    world.registry.admit(instance, {"m": {}})
    world.time += 1000
    world.registry.expire()
    assert instance.state is State.READY and instance.source is Source.STATIC


def test_a_static_instance_without_kv_address_waits_for_one(world) -> None:
    instance = world.registry.add_static(P, StaticInstance("127.0.0.1:1"), P2P)
    world.registry.admit(instance, {"m": {}})
    assert instance.state is State.PROBING and "KV address is unknown" in instance.reason
    assert world.ping(P, 1) is None
    world.registry.admit(instance, {"m": {}})
    assert instance.state is State.READY


def test_a_stranger_cannot_make_the_registry_grow_without_end(world) -> None:
    refused = [world.ping(P, port) for port in range(1, 1100)]
    assert refused[1023] is None and "1024 instances" in refused[1024]


def test_missing_roles_are_described_without_addresses(world) -> None:
    world.ping(P, 1)
    missing = missing_roles(world.registry)
    assert missing == [
        "no prefill instance is ready (one is probing: not probed yet)",
        "no decode instance is ready (none has registered)",
    ]


def test_a_new_process_starts_with_a_closed_breaker(world) -> None:
    instance = world.ready(D, 1)
    for _ in range(9):
        instance.breaker.record_failure(world.time)
    assert not instance.breaker.permits(world.time)
    world.registry.suspend(instance, "refused", gone=True)
    world.registry.admit(instance, {"m": {}})
    assert instance.breaker.permits(world.time)


@pytest.mark.parametrize("end", ["no pings", "another boot", "process gone"])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("kind", [P2P, DISAGG_KV])
def test_legs_on_a_prefill_that_will_not_answer_end_where_decode_can_compute(world, end, role, kind) -> None:
    instance, errors = world.ready(role, 1, kind=kind, boot="a"), []
    for _ in range(2):
        leg = instance.progress.begin(world.registry.now)
        leg.answer, leg.prefill = SimpleNamespace(fail=errors.append), role is Role.PREFILL
    world.time += 9.9
    world.registry.expire()
    assert not errors
    if end == "no pings":
        world.time += 0.1
        world.registry.expire()
        world.registry.expire()
    elif end == "another boot":
        world.ping(role, 1, kind=kind, boot="b")
    else:
        world.registry.suspend(instance, "its HTTP port refuses connections", gone=True)
    assert len(errors) == (2 if role is Role.PREFILL and kind.computes else 0)
    assert not any(isinstance(error, EngineUnreachable) and error.refused for error in errors)


@pytest.mark.parametrize("static", [False, True], ids=["pings", "static"])
def test_an_engine_on_another_http_port_gets_in_when_the_owner_of_its_kv_address_is_gone(world, static) -> None:
    registry, kv = world.registry, parse_address("127.0.0.1:2001")
    if static:
        old = registry.add_static(D, StaticInstance("127.0.0.1:1001", kv.text), P2P)
        registry.admit(old, {"m": {"id": "m"}})
    else:
        old = world.ready(D, 1001)
    world.probes.clear()
    assert "belongs to" in (world.ping(D, 1002, 2001) or "") and world.probes == [old]
    registry.suspend(old, "its HTTP port refuses connections", gone=True)
    assert world.ping(D, 1002, 2001) is None
    new = world.instance(1002)
    registry.admit(new, {"m": {"id": "m"}})
    assert new.state is State.READY and registry.knows(old) is static

    # The old one comes back with the KV address that another one has now.
    if static:
        registry.admit(old, {"m": {"id": "m"}})
        assert old.state is State.PROBING and "belongs to another decode" in old.reason
    assert "belongs to" in (world.ping(D, 1001, 2001) or "")
    registry.suspend(new, "its HTTP port refuses connections", gone=True)
    assert world.ping(D, 1001, 2001) is None
    registry.admit(world.instance(1001), {"m": {"id": "m"}})
    assert world.instance(1001).state is State.READY


def test_a_new_engine_whose_http_server_does_not_answer_yet_keeps_its_kv_address(world) -> None:
    assert world.ping(D, 1001) is None
    world.registry.suspend(world.instance(1001), "its HTTP port refuses connections", gone=True)
    assert "belongs to" in (world.ping(D, 1002, 2001) or "")


def test_prefills_of_a_lost_instance_with_both_roles_fail_and_its_streams_do_not(world) -> None:
    """Decode elsewhere computes what they would have sent; a stream ends with its connection."""
    instance = world.ready(Role.DECODE, 1, kind=KvKind("disagg_kv", both_roles=True))
    assert world.registry.ready(Role.PREFILL) == world.registry.ready(Role.DECODE) == (instance,)
    assert instance.roles == [Role.PREFILL, Role.DECODE] and str(instance).startswith("prefill+decode ")
    prefill, stream = (instance.progress.begin(world.registry.now) for _ in range(2))
    prefill.prefill = True
    world.time += 11
    world.registry.expire()
    assert instance.state is State.LOST
    assert prefill.error is not None and stream.error is None
