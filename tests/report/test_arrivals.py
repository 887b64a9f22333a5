"""When requests arrive and what they ask."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from disagg_report.arrivals import Workload

WORKLOAD = Workload("m", input_tokens=100, output_tokens=7, seconds=50, seed=1, vocabulary=300)


def test_arrivals_are_poisson_at_the_rate_and_the_same_each_time() -> None:
    moments = WORKLOAD.arrival_times(20)
    assert moments == WORKLOAD.arrival_times(20) and moments[0] == 0 and moments == sorted(moments)
    assert len(moments) == 1000 and 48 < moments[-1] <= 50
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    # Of exponential gaps the share that is longer than the mean is 1/e.
    assert sum(gap > 1 / 20 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.05)
    assert Workload("m", 1, 1, 50, seed=2).arrival_times(20) != moments


def test_a_slow_rate_has_requests_all_the_same() -> None:
    assert len(Workload("m", 1, 1, seconds=1, seed=1).arrival_times(0.1)) == 2


def test_prompts_have_their_length_and_beginnings_of_their_own() -> None:
    bodies = [json.loads(body) for body in WORKLOAD.bodies(random.Random(3), 20)]
    assert {len(body["prompt"]) for body in bodies} == {100}
    assert len({tuple(body["prompt"][:16]) for body in bodies}) == 20
    assert all(0 < token < 300 for body in bodies for token in body["prompt"])
    assert bodies[0]["max_tokens"] == 7 and bodies[0]["stream"] and bodies[0]["ignore_eos"]


def test_prompts_shorter_than_their_own_beginning() -> None:
    (body,) = Workload("m", 3, 1, 1, seed=1).bodies(random.Random(3), 1)
    assert len(json.loads(body)["prompt"]) == 3
