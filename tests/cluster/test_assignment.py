"""One word for an assignment, which all workers read alike."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.cluster.assignment import Assignment, Cause, unpack
from disagg_proxy.cluster.choice import Way, way_of
from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.kv_kind import KvKind
from tests.cluster.conftest import World

BOTH = KvKind("disagg_kv", needs_address=False, both_roles=True)


@given(
    st.none() | st.sampled_from(Role),
    st.sampled_from(Cause),
    st.integers(0, 2**40 - 1),
    st.integers(0, 2000),
    st.integers(0, 100),
)
def test_it_comes_back(role: Role | None, cause: Cause, ms: int, wait: int, usage: int) -> None:
    given = Assignment(role, cause, ms / 1000, wait / 100, usage / 100)
    word = given.pack()
    assert 0 <= word < 2**63 and unpack(word) == given and unpack(word).pack() == word


def test_a_later_one_is_greater() -> None:
    early = Assignment(Role.DECODE, Cause.AUTO, 5.0, 20.0, 1.0)
    assert Assignment(None, Cause.FIRST, 5.001).pack() > early.pack()


def test_values_beyond_its_range_are_its_bounds() -> None:
    shown = unpack(Assignment(Role.PREFILL, Cause.PREFILL_WAITS, 1.0, 3600.0, 0.33).pack())
    assert shown.reason == "prompts wait 20470 ms for prefill, and decode has capacity (33 % full)"


def test_a_role_by_hand_is_remembered_for_the_endpoint(world: World) -> None:
    registry = world.registry
    one = world.ready(Role.DECODE, 1, kind=BOTH)
    assert one.prefers(Role.PREFILL) and one.prefers(Role.DECODE)
    registry.assign(one, Assignment(Role.PREFILL, Cause.BY_HAND, world.time))
    assert one.prefers(Role.PREFILL) and not one.prefers(Role.DECODE) and one.serves(Role.DECODE)
    world.time += 1000
    registry.expire()
    world.time += 1000
    registry.expire()
    assert not registry.knows(one)
    again = world.ready(Role.DECODE, 1, kind=BOTH)
    assert again is not one and again.assigned_role is Role.PREFILL
    registry.assign(again, Assignment(None, Cause.AUTO, world.time))
    world.time += 1000
    registry.expire()
    world.time += 1000
    registry.expire()
    assert world.ready(Role.DECODE, 1, kind=BOTH).assignment is None


def test_only_changes_between_the_two_roles_are_moves(world: World) -> None:
    one = world.ready(Role.DECODE, 1, kind=BOTH)
    for role in (Role.DECODE, Role.DECODE, None, Role.PREFILL, Role.DECODE, Role.DECODE, Role.PREFILL):
        world.registry.assign(one, Assignment(role, Cause.FIRST, world.time))
    assert one.role_moves == 2


def test_elastic_placement_takes_it_for_an_engine_of_that_role(world: World) -> None:
    one = world.ready(Role.DECODE, 1, kind=BOTH)
    for role, way in ((Role.PREFILL, Way.PREFILL_ALONE), (Role.DECODE, Way.DECODE_ALONE), (None, Way.DECODE_ALONE)):
        world.registry.assign(one, Assignment(role, Cause.FIRST, world.time))
        assert way_of(None, one) is way and one.present_role is (role or Role.DECODE)


def test_an_engine_with_one_role_has_no_other(world: World) -> None:
    one = world.ready(Role.DECODE, 1)
    world.registry.assign(one, Assignment(Role.PREFILL, Cause.BY_HAND, world.time))
    assert one.assigned_role is None and one.prefers(Role.DECODE) and not one.prefers(Role.PREFILL)
