"""Policies are pure: the same view gives the same choice."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Instance, Role, Source
from disagg_proxy.cluster.policies import (
    DECODE_POLICIES,
    PREFILL_POLICIES,
    Policy,
    Traits,
    View,
    joint,
    least_loaded,
    power_of_two,
    prefix_aware,
    round_robin,
    session,
)
from disagg_proxy.cluster.policies.affinity import UNCACHED_WEIGHT
from disagg_proxy.cluster.policies.joint import COLD_TOKENS, REQUEST_TOKENS
from disagg_proxy.connectors.p2p_nccl import KIND as P2P


@dataclass
class Busy:
    in_flight: int = 0
    tokens_in_flight: int = 0
    kv_waiting_tokens: int = 0
    salt: int = 0


def salt_of(port: int) -> int:
    return Instance(Role.PREFILL, parse_address(f"127.0.0.1:{20000 + port}"), None, Source.STATIC, P2P).salt


def busy(*loads: int) -> list[Busy]:
    return [Busy(load, salt=salt_of(port)) for port, load in enumerate(loads)]


def holding(*tokens: int) -> list[Busy]:
    return [Busy(1 if load else 0, load, salt=salt_of(port)) for port, load in enumerate(tokens)]


def test_round_robin_takes_each_in_turn_whatever_the_load() -> None:
    assert [round_robin(View(busy(9, 0, 0), turn)) for turn in range(5)] == [0, 1, 2, 0, 1]


def test_least_loaded_takes_the_idlest() -> None:
    assert least_loaded(View(busy(3, 1, 2))) == 1


def test_least_loaded_counts_tokens_before_requests() -> None:
    assert least_loaded(View([Busy(1, 9000), Busy(8, 800), Busy(2, 801)])) == 1
    assert least_loaded(View([Busy(3, 500), Busy(2, 500)])) == 1


def test_least_loaded_shares_ties_in_turn() -> None:
    assert [least_loaded(View(busy(1, 1, 1), turn)) for turn in range(4)] == [0, 1, 2, 0]
    assert [least_loaded(View(busy(0, 5, 0), turn)) for turn in range(4)] == [0, 2, 2, 0]


def test_power_of_two_draws_every_pair_alike_and_takes_its_lighter_one() -> None:
    draws = 12 * 20
    chosen = [power_of_two(View(holding(0, 10, 20, 30), random=(i + 0.5) / draws)) for i in range(draws)]
    # Of the six pairs three hold the first, two more the second, one more the third.
    assert [chosen.count(at) for at in range(4)] == [120, 80, 40, 0]
    assert power_of_two(View(holding(5), random=0.99)) == 0


def test_a_known_prompt_goes_where_it_is_known_until_the_queue_costs_more() -> None:
    saved = round(900 * UNCACHED_WEIGHT)
    for queue, right in ((0, 1), (250, 1), (saved - 1, 1), (saved + 1, 0)):
        view = View(holding(0, queue), traits=Traits(tokens=1000), uncached=[1000, 100], bound=4.0)
        assert prefix_aware(view) == right, queue


def test_an_unknown_prompt_goes_to_the_least_loaded_and_equals_agree_by_its_home() -> None:
    assert prefix_aware(View(holding(500, 300, 400), traits=Traits(tokens=10, home=7), uncached=[10] * 3)) == 1
    assert [prefix_aware(View(busy(0, 0, 0), turn, Traits(10), [10] * 3)) for turn in range(4)] == [0, 1, 2, 0]
    idle = busy(0, 0, 0, 0)
    homes = [prefix_aware(View(idle, turn, Traits(10, home=7), [10] * 4)) for turn in range(8)]
    assert len(set(homes)) == 1
    spread = {prefix_aware(View(idle, 0, Traits(10, home=home), [10] * 4)) for home in range(64)}
    assert spread == {0, 1, 2, 3}


def test_nothing_known_of_a_request_is_least_loaded() -> None:
    assert [prefix_aware(View(busy(1, 0, 0), turn)) for turn in range(3)] == [1, 1, 2]
    assert [session(View(busy(1, 0, 0), turn)) for turn in range(3)] == [1, 1, 2]


def test_joint_prefers_a_connected_pair_up_to_a_bound() -> None:
    cold_first = [COLD_TOKENS, 0]
    assert joint(View(holding(0, 0), link_costs=cold_first)) == 1
    light, heavy = Busy(0, 0), Busy(4, COLD_TOKENS)
    assert joint(View([light, heavy], link_costs=cold_first)) == 0


def test_joint_counts_context_requests_and_waiting_kv() -> None:
    assert joint(View([Busy(1, 3000), Busy(8, 100)])) == (0 if 100 + 7 * REQUEST_TOKENS > 3000 else 1)
    assert joint(View([Busy(1, 500, kv_waiting_tokens=500), Busy(1, 900)])) == 1
    assert joint(View([Busy(1, 500, kv_waiting_tokens=300), Busy(1, 900)])) == 0


loads = st.lists(st.integers(0, 50_000), min_size=1, max_size=12)
ALL = {**PREFILL_POLICIES, **DECODE_POLICIES}


@pytest.mark.parametrize("policy", ALL.values(), ids=ALL)
@given(loads=loads, turn=st.integers(0, 10**9), data=st.data())
def test_every_policy_is_pure_and_in_range(policy: Policy, loads: list[int], turn: int, data: st.DataObject) -> None:
    uncached = data.draw(st.lists(st.integers(0, 9000), min_size=len(loads), max_size=len(loads)))
    draw = data.draw(st.floats(0, 1, exclude_max=True))
    traits = Traits(9000, home=data.draw(st.integers()), session=data.draw(st.none() | st.integers()))
    view = View(holding(*loads), turn, traits, uncached, random=draw)
    assert policy(view) == policy(view) and 0 <= policy(view) < len(loads)


@pytest.mark.parametrize("policy", [prefix_aware, session], ids=["prefix_aware", "session"])
@given(loads=loads, name=st.integers(), tokens=st.integers(0, 9000), bound=st.floats(1, 4), data=st.data())
def test_the_load_bound_holds(
    policy: Policy, loads: list[int], name: int, tokens: int, bound: float, data: st.DataObject
) -> None:
    uncached = data.draw(st.lists(st.integers(0, tokens), min_size=len(loads), max_size=len(loads)))
    view = View(holding(*loads), 0, Traits(tokens, home=name, session=name), uncached, bound=bound)
    assert loads[policy(view)] <= bound * sum(loads) / len(loads) + tokens


@given(loads=loads, data=st.data())
def test_a_prefix_never_makes_a_request_wait_longer_than_it_saves(loads: list[int], data: st.DataObject) -> None:
    uncached = data.draw(st.lists(st.integers(0, 9000), min_size=len(loads), max_size=len(loads)))
    at = prefix_aware(View(holding(*loads), 0, Traits(9000), uncached))
    least = loads.index(min(loads))
    assert loads[at] - loads[least] <= UNCACHED_WEIGHT * (uncached[least] - uncached[at])


@pytest.mark.parametrize("policy", [prefix_aware, session], ids=["prefix_aware", "session"])
@given(count=st.integers(2, 12), name=st.integers(), gone=st.integers(0, 11))
def test_an_instance_that_goes_moves_only_its_own(policy: Policy, count: int, name: int, gone: int) -> None:
    idle = busy(*[0] * count)
    gone %= count
    before = idle[policy(View(idle, 0, Traits(100, home=name, session=name), [100] * count))]
    rest = [one for one in idle if one is not idle[gone]]
    after = rest[policy(View(rest, 5, Traits(100, home=name, session=name), [100] * (count - 1)))]
    assert after is before or before is idle[gone]


def test_rendezvous_spreads_names_evenly() -> None:
    idle = busy(*[0] * 8)
    counts = [0] * 8
    for name in range(4000):
        counts[session(View(idle, 0, Traits(session=name)))] += 1
    assert min(counts) > 400 and max(counts) < 600
