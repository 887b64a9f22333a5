"""The engine's counters as proof that decode has loaded the KV of an unstreamed request."""

from __future__ import annotations

import pytest

from disagg_proxy.cluster.instance import Role
from disagg_proxy.connectors.p2p_nccl_loads import StepStats, WatchedLeg, _proves, step_stats
from disagg_sim.metrics import Counters, exposition
from tests.cluster.conftest import World


@pytest.mark.parametrize(
    ("seen", "proof"),
    [
        ([(5, 0), (7, 0)], True),
        ([(5, 3), (7, 0)], True),
        ([(5, 0), (6, 0)], False),
        ([(5, 0), (5, 0), (5, 0)], False),
        ([(5, 0), (9, 1)], False),
        ([(5, 0), (9, 1), (10, 0)], True),
        ([(5, 0), (0, 0)], False),
        ([(5, 0), (0, 0), (2, 0)], True),
    ],
    ids=["a whole step", "a queue that was worked off", "the step in progress", "stalled", "it may wait", "later",
         "another process", "and its steps"],
)  # fmt: skip
def test_a_whole_step_after_which_nothing_waited_is_a_proof(seen: list[tuple[int, int]], proof: bool) -> None:
    leg = WatchedLeg(World().ready(Role.DECODE, 1), lambda: None)
    found = [_proves(leg, StepStats(*stats)) for stats in seen]
    assert found == [False] * (len(seen) - 1) + [proof]


def test_counters_are_read_from_metrics_of_one_or_several_engines() -> None:
    text = exposition(Counters(), model="m", running=2, waiting=3, steps=7)
    other = exposition(Counters(), model="m", running=2, waiting=1, steps=4).replace('engine="0"', 'engine="1"')
    assert step_stats(text.encode()) == StepStats(7, 3)
    assert step_stats((text + other).encode()) == StepStats(4, 4)


@pytest.mark.parametrize("text", [b"", b"vllm:num_requests_waiting 0.0\n", b"vllm:num_requests_waiting x\n"])
def test_an_engine_without_counters_proves_nothing(text: bytes) -> None:
    assert step_stats(text) is None
