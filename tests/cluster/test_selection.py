"""Which instances are paired: both ready, both serving the requested model."""

import pytest

from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.kv_compatibility import STALE
from disagg_proxy.cluster.policies import least_loaded, round_robin
from disagg_proxy.cluster.selection import Selection
from disagg_proxy.cluster.unavailable import why_no_pair
from disagg_proxy.errors import NoPair, UnknownModel

P, D = Role.PREFILL, Role.DECODE


@pytest.fixture
def selection(world):
    return Selection(world.registry, least_loaded, least_loaded)


def test_only_instances_of_the_same_model_are_paired(world, selection) -> None:
    a, b = world.ready(P, 1, "a"), world.ready(P, 2, "b")
    c, d = world.ready(D, 3, "b"), world.ready(D, 4, "a")
    assert (selection.choose("a").prefill, selection.choose("a").decode) == (a, d)
    assert (selection.choose("b").prefill, selection.choose("b").decode) == (b, c)
    assert selection.ready_pairs() == 2


def test_prefill_and_decode_are_chosen_independently(world, selection) -> None:
    p1, p2 = world.ready(P, 1), world.ready(P, 2)
    d1, d2 = world.ready(D, 3), world.ready(D, 4)
    p1.in_flight += 1
    d2.in_flight += 1
    pair = selection.choose("m")
    assert (pair.prefill, pair.decode) == (p2, d1)


def test_round_robin_uses_every_combination_member(world) -> None:
    for port in (1, 2):
        world.ready(P, port)
    for port in (3, 4, 5):
        world.ready(D, port)
    selection = Selection(world.registry, round_robin, round_robin)
    pairs = {(x.prefill.http.port, x.decode.http.port) for x in (selection.choose("m") for _ in range(6))}
    assert pairs == {(p, d) for p in (1, 2) for d in (3, 4, 5)}


def test_unknown_model_names_those_that_exist(world, selection) -> None:
    world.ready(P, 1, "a", "lora")
    world.ready(D, 2, "a")
    with pytest.raises(UnknownModel, match=r"'zzz' does not exist here. Models that exist: a, lora"):
        selection.choose("zzz")


def test_a_model_on_one_side_only_is_no_pair(world, selection) -> None:
    world.ready(P, 1, "a", "lora")
    world.ready(D, 2, "a")
    with pytest.raises(NoPair, match="no ready decode instance that serves 'lora'"):
        selection.choose("lora")


def test_without_instances_the_error_names_both_roles_and_retry_after(selection) -> None:
    with pytest.raises(NoPair, match=r"no prefill instance is ready.*no decode instance is ready") as caught:
        selection.choose("m")
    assert caught.value.headers() == {"Retry-After": "3", "X-Should-Retry": "true"}


def test_no_model_means_the_same_default_on_both_sides(world, selection) -> None:
    world.ready(P, 1, "a", "shared")
    world.ready(D, 2, "b", "shared")
    with pytest.raises(NoPair, match="same default model"):
        selection.choose(None)
    decode = world.ready(D, 3, "a")
    assert selection.choose(None).decode is decode


def test_one_engine_routes_take_either_role(world, selection) -> None:
    with pytest.raises(NoPair):
        selection.choose_single(None)
    instance = world.ready(D, 2, "a")
    assert selection.choose_single("a") is instance
    with pytest.raises(UnknownModel):
        selection.choose_single("b")


def test_unknown_model_names_are_not_cached(world, selection) -> None:
    world.ready(P, 1)
    world.ready(D, 2)
    for i in range(100):
        with pytest.raises(UnknownModel):
            selection.choose(f"made-up-{i}")
    assert len(world.registry._serving) <= 4


def test_a_prefill_that_has_sent_to_an_ended_decode_is_not_paired_with_its_successor(world, selection) -> None:
    prefill, decode = world.ready(P, 1), world.ready(D, 2)
    world.registry.kv_compatibility.record_send(prefill, decode)
    assert selection.ready_pairs() == 1
    world.registry.suspend(decode, "refused", gone=True)
    world.registry.admit(decode, {"m": {}})
    assert selection.ready_pairs() == 0 and why_no_pair(world.registry) == STALE
    with pytest.raises(NoPair, match="restart the prefill instances"):
        selection.choose("m")
    world.registry.suspend(prefill, "refused", gone=True)
    world.registry.admit(prefill, {"m": {}})
    assert selection.choose("m").prefill is prefill


def test_another_prefill_takes_its_place(world, selection) -> None:
    stale, fresh, decode = world.ready(P, 1), world.ready(P, 3), world.ready(D, 2)
    world.registry.kv_compatibility.record_send(stale, decode)
    world.registry.suspend(decode, "refused", gone=True)
    world.registry.admit(decode, {"m": {}})
    assert {selection.choose("m").prefill for _ in range(4)} == {fresh}
    other = world.ready(D, 4)
    chosen = {(pair.prefill, pair.decode) for pair in (selection.choose("m") for _ in range(12))}
    assert (stale, decode) not in chosen and (stale, other) in chosen


def test_a_decode_that_was_only_late_is_the_same_process(world, selection) -> None:
    prefill, decode = world.ready(P, 1), world.ready(D, 2)
    world.registry.kv_compatibility.record_send(prefill, decode)
    world.registry.suspend(decode, "its /health does not answer in time")
    world.registry.admit(decode, {"m": {}})
    assert selection.choose("m").decode is decode


def test_missing_pings_do_not_prove_that_a_process_ended(world, selection) -> None:
    prefill, decode = world.ready(P, 1), world.ready(D, 2)
    world.registry.kv_compatibility.record_send(prefill, decode)
    world.time += 5
    world.ping(P, 1)
    world.time += 6
    world.registry.expire()
    world.ready(D, 2)
    assert selection.choose("m").decode is decode


def test_a_refused_connection_proves_nothing_while_the_liveness_connection_is_open(world, selection) -> None:
    prefill, decode = world.ready(P, 1), world.ready(D, 2)
    world.registry.has_liveness_connection = lambda instance: True
    world.registry.kv_compatibility.record_send(prefill, decode)
    world.registry.connection_refused(decode, "refused")
    world.registry.admit(decode, {"m": {}})
    assert selection.choose("m").decode is decode and decode.epoch == 0
