"""Engines of both roles get legs of the assigned one, and of the other where no other instance can take them."""

from __future__ import annotations

import pytest

from disagg_proxy.cluster.assignment import Assignment, Cause
from disagg_proxy.cluster.choice import NoCapacity, PlacementPreference, SingleEngine
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.policies import round_robin
from disagg_proxy.cluster.selection import Selection
from tests.cluster.conftest import World

BOTH = KvKind("disagg_kv", both_roles=True)
OWN = KvKind("disagg_kv")
P, D = Role.PREFILL, Role.DECODE


@pytest.fixture
def selection(world: World) -> Selection:
    return Selection(world.registry, round_robin, round_robin)


def three(world: World, *roles: Role | None) -> list[Instance]:
    engines = [world.ready(D, port, kind=BOTH) for port in (1, 2, 3)]
    for engine, role in zip(engines, roles, strict=False):
        assign(world, engine, role)
    return engines


def assign(world: World, engine: Instance, role: Role | None) -> None:
    world.registry.assign(engine, Assignment(role, Cause.BY_HAND if role else Cause.AUTO, world.time))


def served(selection: Selection, times: int = 12, **how) -> tuple[set[Instance], set[Instance]]:
    pairs = [selection.choose("m", **how) for _ in range(times)]
    return {pair.prefill for pair in pairs}, {pair.decode for pair in pairs}


@pytest.mark.parametrize("limits", [None, lambda instance: True], ids=["cached", "with limits"])
def test_legs_go_by_the_assigned_role(world: World, selection: Selection, limits) -> None:
    a, b, c = three(world, P, D, D)
    assert served(selection, has_capacity=limits) == ({a}, {b, c})
    assign(world, b, P)
    assert served(selection, has_capacity=limits) == ({a, b}, {c})
    assign(world, b, None)
    assert served(selection, has_capacity=limits) == ({a, b}, {b, c})


def test_engines_with_one_role_and_without_assignment_are_as_ever(world: World, selection: Selection) -> None:
    prefill, decode = world.ready(P, 11, kind=OWN), world.ready(D, 12, kind=OWN)
    a, b, c = three(world)
    assert served(selection, 40) == ({prefill, a, b, c}, {decode, a, b, c})


@pytest.mark.parametrize("role", Role)
def test_all_of_one_role_serve_the_other_one_too(world: World, selection: Selection, role: Role) -> None:
    engines = three(world, role, role, role)
    assert served(selection, 30) == (set(engines), set(engines))


def test_one_that_cannot_serve_is_replaced_by_those_of_the_other_role(world: World, selection: Selection) -> None:
    a, b, c = three(world, P, D, D)
    for change, back in (
        (lambda: world.registry.drain(a), lambda: world.registry.drain(a, False)),
        (lambda: world.registry.suspect(a, True), lambda: world.registry.suspect(a, False)),
        (lambda: world.registry.suspend(a, "x"), lambda: world.registry.admit(a, {"m": {}})),
    ):
        change()
        assert served(selection) == ({b, c}, {b, c})
        back()
        assert served(selection) == ({a}, {b, c})
    assert served(selection, excluded={a}) == ({b, c}, {b, c})
    assert served(selection, excluded={b}) == ({a}, {c})


def test_without_capacity_in_its_role_a_request_waits(world: World, selection: Selection) -> None:
    a, *_ = three(world, P, D, D)
    with pytest.raises(NoCapacity):
        selection.choose("m", has_capacity=lambda instance: instance is not a)


def test_a_request_without_prefill_goes_to_a_decode(world: World, selection: Selection) -> None:
    a, b, c = three(world, P, D, D)
    found = {selection.place("m", PlacementPreference.ALONE).engine for _ in range(9)}
    assert found == {b, c}
    for engine in (b, c):
        world.registry.drain(engine)
    assert selection.place("m", PlacementPreference.EITHER) == SingleEngine(a)


def test_routes_that_run_the_model_go_to_a_prefill(world: World, selection: Selection) -> None:
    a, *_ = three(world, P, D, D)
    assert {selection.choose_single("m", computes=True) for _ in range(9)} == {a}


def test_a_move_frees_what_waits_in_the_queue(world: World, selection: Selection) -> None:
    freed: list[bool] = []
    world.registry.watch(freed=lambda: freed.append(True))
    three(world, P)
    assert freed
