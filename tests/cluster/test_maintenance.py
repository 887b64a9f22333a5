"""An instance that an operator has drained: in no pair, whatever happens to it, until undrained."""

import pytest

from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.cluster.kv_compatibility import STALE
from disagg_proxy.cluster.lease import KvClaim, Lease
from disagg_proxy.cluster.policies import least_loaded
from disagg_proxy.cluster.selection import Selection
from disagg_proxy.cluster.unavailable import DRAINED, missing_roles, why_no_pair
from disagg_proxy.errors import NoPair, UnknownModel

P, D = Role.PREFILL, Role.DECODE


@pytest.fixture
def selection(world) -> Selection:
    return Selection(world.registry, least_loaded, least_loaded)


def refusal(selection: Selection, model: str | None = "m") -> str:
    with pytest.raises(NoPair) as caught:
        selection.choose(model)
    assert "127.0.0.1" not in caught.value.message, "clients read it"
    assert caught.value.headers() == {"Retry-After": "3", "X-Should-Retry": "true"}
    return caught.value.message.partition(": ")[2]


def restart(world, instance: Instance) -> None:
    world.registry.suspend(instance, "refused", gone=True)
    world.registry.admit(instance, instance.models)


@pytest.mark.parametrize("model", ["m", None], ids=["named", "default"])
def test_the_others_take_its_place_and_it_comes_back(world, selection, model) -> None:
    prefills, decodes = [world.ready(P, port) for port in (1, 2)], [world.ready(D, port) for port in (3, 4)]
    world.registry.drain(prefills[0])
    world.registry.drain(decodes[1])
    assert {(x.prefill, x.decode) for x in (selection.choose(model) for _ in range(8))} == {(prefills[1], decodes[0])}
    assert selection.ready_pairs() == 1
    for instance in (prefills[0], decodes[1]):
        world.registry.drain(instance, draining=False)
    assert {selection.choose(model).prefill for _ in range(8)} == set(prefills)
    assert selection.ready_pairs() == 4


def test_one_engine_routes_avoid_it(world, selection) -> None:
    prefill, decode = world.ready(P, 1), world.ready(D, 2)
    world.registry.drain(prefill)
    assert {selection.choose_single("m") for _ in range(4)} == {decode}
    world.registry.drain(decode)
    with pytest.raises(NoPair, match="drained for maintenance"):
        selection.choose_single("m")


@pytest.mark.parametrize("role", list(Role))
def test_without_another_instance_the_error_names_the_drain(world, selection, role) -> None:
    instances = {P: world.ready(P, 1), D: world.ready(D, 2)}
    world.registry.drain(instances[role])
    expected = f"no {role.value} instance is ready (one is drained for maintenance)"
    assert refusal(selection) == expected + "."
    assert missing_roles(world.registry) == [expected] and selection.ready_pairs() == 0


def test_a_model_that_only_a_drained_instance_serves_still_exists(world, selection) -> None:
    world.ready(P, 1, "a", "b")
    world.ready(D, 2, "a")
    drained = world.ready(D, 3, "b")
    world.registry.drain(drained)
    assert refusal(selection, "b") == f"no ready decode instance that serves 'b'; {DRAINED}."
    world.registry.suspend(drained, "restarting", gone=True)
    assert refusal(selection, "b") == f"no ready decode instance that serves 'b'; {DRAINED}."
    world.registry.drain(world.ready(P, 4, "z"))
    world.registry.drain(world.ready(D, 5, "z"))
    for port in (4, 5):
        world.registry.suspend(world.instance(port), "restarting", gone=True)
    assert refusal(selection, "z").endswith(DRAINED + ".")
    with pytest.raises(UnknownModel):
        selection.choose("c")


def test_instances_that_do_not_fit_say_that_others_are_drained(world, selection) -> None:
    prefill = world.ready(P, 1, "a")
    world.ready(D, 2, "b")
    other = world.ready(D, 3, "a")
    world.registry.drain(other)
    assert why_no_pair(world.registry) == f"no prefill and decode instance serve the same model; {DRAINED}"
    assert refusal(selection, None).endswith(f"; {DRAINED}.")
    world.registry.drain(other, draining=False)
    assert selection.choose("a").prefill is prefill


def test_stale_prefills_say_that_others_are_drained(world, selection) -> None:
    prefill, fresh, decode = world.ready(P, 1), world.ready(P, 2), world.ready(D, 3)
    world.registry.kv_compatibility.record_send(prefill, decode)
    restart(world, decode)
    world.registry.drain(fresh)
    assert refusal(selection) == f"{STALE}; {DRAINED}."
    assert why_no_pair(world.registry) == f"{STALE}; {DRAINED}"


def test_an_ejected_instance_is_named_beside_the_drain_if_one_matters(world, selection) -> None:
    prefill, decode, other = world.ready(P, 1), world.ready(D, 2), world.ready(D, 3)
    for _ in range(5):
        decode.breaker.record_failure(world.time)
    world.registry.drain(other)
    world.registry.drain(world.ready(D, 4, "another"))
    failing = "every decode instance keeps failing and is ejected for a while (circuit breaker)"
    assert refusal(selection) == f"{failing}; {DRAINED}."
    world.registry.drain(other, draining=False)
    for _ in range(5):
        other.breaker.record_failure(world.time)
    assert refusal(selection) == f"{failing}."
    world.registry.drain(other)
    world.registry.suspend(prefill, "refused")
    with pytest.raises(NoPair) as caught:
        selection.choose("m")
    assert not caught.value.drained, "an undrain would not help"


def test_pings_probes_and_a_restart_leave_it_drained(world, selection) -> None:
    prefill, decode = world.ready(P, 1), world.ready(D, 2)
    world.registry.drain(decode)
    world.ping(D, 2)
    world.registry.admit(decode, {"m": {}, "n": {}})
    restart(world, decode)
    assert decode.draining and decode.state is State.READY and selection.ready_pairs() == 0
    world.registry.drain(decode, draining=False)
    assert selection.choose("m").prefill is prefill


def test_it_is_not_forgotten_however_long_the_maintenance_takes(world) -> None:
    decode, other = world.ready(D, 2), world.ready(D, 3)
    world.registry.drain(decode)
    world.time += 11
    world.registry.expire()
    world.time += 86_400
    world.registry.expire()
    assert list(world.registry.instances()) == [decode] and decode.state is State.LOST
    assert world.ping(D, 2) is None and decode.draining
    world.registry.drain(decode, draining=False)
    world.time += 11
    world.registry.expire()
    world.time += 61
    world.registry.expire()
    assert not world.registry.instances() and other.state is State.LOST


def test_a_new_process_at_a_drained_endpoint_is_drained_too(world) -> None:
    decode = world.ready(D, 2, "m")
    world.registry.drain(decode)
    world.registry.suspend(decode, "refused", gone=True)
    assert world.ping(D, 2, kv_port=9999) is None
    successor = world.instance(2)
    assert successor is not decode and successor.draining
    world.registry.drain(successor, draining=False)
    world.registry.suspend(successor, "refused")
    assert world.ping(D, 2, kv_port=9998) is None and not world.instance(2).draining


def test_watchers_hear_of_both(world) -> None:
    decode = world.ready(D, 2)
    del world.changed[:]
    world.registry.drain(decode)
    world.registry.drain(decode, draining=False)
    assert world.changed == [decode, decode]


def test_legs_and_kv_that_is_on_its_way_keep_both_sides_from_being_idle(world) -> None:
    prefill, decode = world.ready(P, 1), world.ready(D, 2)
    assert prefill.idle and decode.idle
    legs = Lease(world.registry, prefill), Lease(world.registry, decode)
    kv = KvClaim(world.registry, prefill, decode, 0)
    legs[0].end()
    assert not prefill.idle, "its last tensor may still be on the way"
    freed = []
    world.registry.watch(freed=lambda: freed.append(prefill.idle))
    kv.release()
    kv.release()
    assert freed == [True]
    assert prefill.idle and not decode.idle
    legs[1].end()
    assert decode.idle and decode.kv_waiting == prefill.kv_waiting == 0


def test_kv_counts_at_its_true_size_once_that_is_known(world) -> None:
    prefill, decode = world.ready(P, 1), world.ready(D, 2)
    kv, other = (KvClaim(world.registry, prefill, decode, size) for size in (900, 100))
    freed: list[int] = []
    world.registry.watch(freed=lambda: freed.append(decode.kv_waiting_tokens))
    for size in (400, 400, 700):
        kv.resize(size)
        assert decode.kv_waiting_tokens == size + 100
    assert freed == [500], "only what frees room is announced, once"
    kv.release()
    kv.resize(5)
    assert decode.kv_waiting_tokens == 100
    other.release()
    assert decode.kv_waiting_tokens == decode.kv_waiting == 0


def test_an_orphan_counts_until_decodes_process_ends(world) -> None:
    prefill, decode = world.ready(P, 1), world.ready(D, 2)
    orphan, live = (KvClaim(world.registry, prefill, decode, size) for size in (900, 100))
    orphan.orphan()
    orphan.orphan()
    assert (decode.kv_waiting, prefill.kv_waiting, decode.kv_waiting_tokens) == (1, 1, 1000)
    live.release()
    live.orphan()
    assert (decode.kv_waiting, decode.kv_waiting_tokens) == (0, 900) and decode.idle
    world.registry.process_ended(decode)
    assert (decode.kv_waiting, prefill.kv_waiting, decode.kv_waiting_tokens) == (0, 0, 0)
