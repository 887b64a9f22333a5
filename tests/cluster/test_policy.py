"""Policies are pure: the same snapshot and turn give the same choice."""

from dataclasses import dataclass

from disagg_proxy.cluster.policy import least_loaded, round_robin


@dataclass
class Busy:
    in_flight: int


def busy(*loads: int) -> list[Busy]:
    return [Busy(load) for load in loads]


def test_round_robin_takes_each_in_turn_whatever_the_load() -> None:
    assert [round_robin(busy(9, 0, 0), turn) for turn in range(5)] == [0, 1, 2, 0, 1]


def test_least_loaded_takes_the_idlest() -> None:
    assert least_loaded(busy(3, 1, 2), 0) == 1


def test_least_loaded_shares_ties_in_turn() -> None:
    assert [least_loaded(busy(1, 1, 1), turn) for turn in range(4)] == [0, 1, 2, 0]
    assert [least_loaded(busy(0, 5, 0), turn) for turn in range(4)] == [0, 2, 2, 0]
