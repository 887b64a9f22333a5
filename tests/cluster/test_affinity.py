"""The pairing with policies that remember: what a prefill has had, who it has met, and what ends that."""

from __future__ import annotations

import pytest

from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.lease import Lease
from disagg_proxy.cluster.policies import Traits, joint, least_loaded, power_of_two, prefix_aware, session
from disagg_proxy.cluster.policies.affinity import UNCACHED_WEIGHT
from disagg_proxy.cluster.policies.joint import COLD_TOKENS
from disagg_proxy.cluster.policies.table import CACHED_LOAD_DIVISOR, PrefixTable
from disagg_proxy.cluster.selection import NoCapacity, PlacementPreference, Selection
from tests.cluster.conftest import World

P, D = Role.PREFILL, Role.DECODE
ENDS = (100, 200, 400)
OWN = KvKind("disagg_kv", (("tp", 1),), frozenset({"tcp"}))


def asked(*prefix: int, size: int = 400, tokens: int = 400) -> Traits:
    return Traits(tokens, prefix=prefix, size=size)


@pytest.fixture
def selection(world: World) -> Selection:
    return Selection(world.registry, prefix_aware, joint, table=PrefixTable(ENDS))


def machine(world: World, prefills: int = 4, decodes: int = 2) -> None:
    for port in range(1, prefills + 1):
        world.ready(P, port)
    for port in range(11, decodes + 11):
        world.ready(D, port)


def test_the_same_prefix_goes_to_the_same_prefill_and_others_spread(world: World, selection: Selection) -> None:
    machine(world)
    first = selection.choose("m", traits=asked(1, 2))
    assert (first.prefill_tokens, first.decode_tokens) == (400, 400)
    for _ in range(5):
        again = selection.choose("m", traits=asked(1, 2, 3))
        assert again.prefill is first.prefill
    assert again.prefill_tokens == 400 // CACHED_LOAD_DIVISOR
    half = selection.choose("m", traits=asked(1, 77))
    assert half.prefill is first.prefill and half.prefill_tokens == 300 + 100 // CACHED_LOAD_DIVISOR
    others = {selection.choose("m", traits=asked(100 * n, 100 * n + 1)).prefill for n in range(2, 10)}
    assert len(others) == 4


def test_a_busy_one_loses_the_prefix_to_the_next_and_both_have_it_then(world: World, selection: Selection) -> None:
    machine(world)
    first = selection.choose("m", traits=asked(1, 2)).prefill
    lease = Lease(world.registry, first, int(400 * UNCACHED_WEIGHT) + 401)
    second = selection.choose("m", traits=asked(1, 2)).prefill
    assert second is not first
    lease.end()
    assert {selection.choose("m", traits=asked(1, 2)).prefill for _ in range(8)} == {first, second}


def test_a_restarted_prefill_has_nothing(world: World, selection: Selection) -> None:
    machine(world)
    first = selection.choose("m", traits=asked(1, 2)).prefill
    world.registry.suspend(first, "refused", gone=True)
    world.registry.admit(first, {"m": {}})
    assert {selection.choose("m", traits=asked(1, 2)).prefill_tokens for _ in range(1)} == {400}


def test_on_a_retry_the_next_one_takes_over(world: World, selection: Selection) -> None:
    machine(world)
    first = selection.choose("m", traits=asked(1, 2)).prefill
    second = selection.choose("m", excluded=[first], traits=asked(1, 2))
    assert second.prefill is not first and second.prefill_tokens == 400
    assert selection.choose("m", excluded=[first], traits=asked(1, 2)).prefill is second.prefill


def test_a_drained_or_full_one_is_left_out_and_found_again(world: World, selection: Selection) -> None:
    machine(world)
    first = selection.choose("m", traits=asked(1, 2)).prefill
    assert selection.choose("m", has_capacity=lambda i: i is not first, traits=asked(5, 6)).prefill is not first
    world.registry.drain(first)
    assert selection.choose("m", traits=asked(1, 2, 3)).prefill is not first
    world.registry.drain(first, draining=False)
    assert (
        selection.choose("m", excluded=[], has_capacity=lambda i: i is first or i.role is D, traits=asked(1, 2)).prefill
        is first
    )


def test_a_request_without_capacity_is_not_recorded(world: World, selection: Selection) -> None:
    machine(world)
    with pytest.raises(NoCapacity):
        selection.choose("m", has_capacity=lambda i: False, traits=asked(1, 2))
    assert selection.choose("m", traits=asked(1, 2)).prefill_tokens == 400


def test_a_prefix_does_not_lead_across_kinds(world: World) -> None:
    selection = Selection(world.registry, prefix_aware, joint, table=PrefixTable(ENDS))
    old, new = world.ready(P, 1), world.ready(P, 2, kind=OWN)
    decode = world.ready(D, 11)
    assert selection.choose("m", traits=asked(1, 2)).prefill is old
    own = world.ready(D, 12, kind=OWN)
    world.registry.drain(decode)
    assert (pair := selection.choose("m", traits=asked(1, 2))).prefill is new and pair.decode is own
    assert pair.prefill_tokens == 400


def test_the_table_is_bounded_and_drops_the_oldest() -> None:
    world = World()
    prefill = world.ready(P, 1)
    table = PrefixTable(ENDS, capacity=10)
    for n in range(0, 1000, 10):
        table.record(asked(n, n + 1), prefill)
    assert len(table) == 10
    assert table.uncached_tokens(asked(990, 991), [prefill]) == [200] and table.uncached_tokens(
        asked(0, 1), [prefill]
    ) == [400]


def test_a_beginning_outlives_what_goes_on_from_it() -> None:
    world = World()
    prefill = world.ready(P, 1)
    table = PrefixTable(ENDS, capacity=3)
    table.record(asked(1, 2, 3), prefill)
    table.record(asked(9), prefill)
    assert table.uncached_tokens(asked(1, 2, 3), [prefill]) == [200]


def test_beyond_the_last_name_the_longest_prompt_counts() -> None:
    world = World()
    prefill = world.ready(P, 1)
    table = PrefixTable(ENDS)
    table.record(asked(1, 2, 3, size=4000, tokens=4000), prefill)
    assert table.uncached_tokens(asked(1, 2, 3, size=8000, tokens=8000), [prefill]) == [4000]
    assert table.uncached_tokens(asked(1, 2, 3, size=900, tokens=900), [prefill]) == [0]


def test_the_table_is_cleared_when_there_are_too_many_processes() -> None:
    world = World()
    prefill, other = world.ready(P, 1), world.ready(P, 2)
    table = PrefixTable(ENDS)
    table.record(asked(1), other)
    for _ in range(1023):
        prefill.epoch += 1
        assert table.uncached_tokens(asked(1), [prefill, other]) == [400, 300]
        table.record(asked(1), prefill)
        assert table.uncached_tokens(asked(1), [prefill, other]) == [300, 300]
    prefill.epoch += 1
    table.record(asked(1), prefill)
    assert table.uncached_tokens(asked(1), [prefill, other]) == [300, 400]


def test_a_session_moves_only_when_its_instance_goes(world: World) -> None:
    machine(world, 4, 4)
    selection = Selection(world.registry, session, session)
    pair = {name: selection.choose("m", traits=Traits(10, session=name)) for name in range(40)}
    assert len({p.prefill for p in pair.values()}) == len({p.decode for p in pair.values()}) == 4
    gone = pair[0].prefill
    world.registry.drain(gone)
    for name, before in pair.items():
        after = selection.choose("m", traits=Traits(10, session=name))
        assert after.decode is before.decode
        assert (after.prefill is before.prefill) == (before.prefill is not gone)


def test_joint_keeps_to_decodes_that_prefill_has_met(world: World) -> None:
    machine(world, 1, 3)
    selection = Selection(world.registry, least_loaded, joint)
    first = selection.choose("m", traits=asked())
    world.registry.kv_compatibility.record_send(first.prefill, first.decode)
    assert {selection.choose("m", traits=asked()).decode for _ in range(6)} == {first.decode}
    Lease(world.registry, first.decode, COLD_TOKENS + 1)
    second = selection.choose("m", traits=asked()).decode
    assert second is not first.decode
    world.registry.suspend(second, "refused", gone=True)
    world.registry.admit(second, {"m": {}})
    assert not world.registry.kv_compatibility.connected(first.prefill, second)


def test_own_connector_is_introduced_and_never_cold(world: World) -> None:
    prefill, decode = world.ready(P, 1, kind=OWN), world.ready(D, 2, kind=OWN)
    assert world.registry.kv_compatibility.connected(prefill, decode)


def test_a_configured_distance_counts(world: World) -> None:
    machine(world, 1, 2)
    near = world.instance(12)
    selection = Selection(world.registry, least_loaded, joint)
    selection.distance = lambda prefill, decode: 0 if decode is near else 100
    assert {selection.choose("m").decode for _ in range(4)} == {near}


def test_power_of_two_draws_from_what_it_is_given(world: World) -> None:
    machine(world, 4, 4)
    numbers = iter([0.0, 0.5] * 20)
    selection = Selection(world.registry, power_of_two, power_of_two, random=lambda: next(numbers))
    assert len({selection.choose("m").prefill for _ in range(10)}) == 1


def test_a_lease_takes_and_gives_back_tokens(world: World) -> None:
    prefill = world.ready(P, 1)
    first, second = Lease(world.registry, prefill, 100), Lease(world.registry, prefill, 50)
    assert (prefill.in_flight, prefill.tokens_in_flight) == (2, 150)
    first.end()
    first.end()
    assert (prefill.in_flight, prefill.tokens_in_flight) == (1, 50)
    second.end()
    assert prefill.tokens_in_flight == 0


def test_alone_counts_its_tokens(world: World) -> None:
    world.ready(D, 2, kind=OWN)
    selection = Selection(world.registry, prefix_aware, joint, table=PrefixTable(ENDS))
    found = selection.place("m", PlacementPreference.EITHER, traits=asked(1))
    assert (found.tokens, found.computes) == (400, 400)


@pytest.mark.parametrize("change", ["breaker", "drain", "epoch", "new", "lost"])
def test_the_quick_way_sees_every_change(world: World, change: str) -> None:
    machine(world, 2, 2)
    selection = Selection(world.registry, least_loaded, least_loaded)
    pairs = {(p.prefill, p.decode) for p in (selection.choose("m") for _ in range(4))}
    assert len({p for p, _ in pairs}) == 2
    one = world.instance(1)
    if change == "breaker":
        one.breaker.trip(world.registry.now())
    elif change == "drain":
        world.registry.drain(one)
    elif change == "epoch":
        for decode in (11, 12):
            world.registry.kv_compatibility.record_send(one, world.instance(decode))
            world.registry.kv_compatibility.process_ended(world.instance(decode))
    elif change == "lost":
        world.registry.suspend(one, "silent")
    else:
        newcomer = world.ready(P, 3)
        assert newcomer in {selection.choose("m").prefill for _ in range(3)}
        return
    assert one not in {selection.choose("m").prefill for _ in range(4)}
