"""The installed H200 profile against what was measured (docs/elastic.md): fitted on 12 and 24 requests/s, it predicts
the other rows.

Two H200s, vLLM 0.33.0, a 3.65B model, 2,000 tokens in and 128 out, KV caches of ``10G`` (vLLM reads 10 GiB), one run of
8 s a point: Poisson arrivals as the project's load generator makes them, plain engines in turn. A single run of 8 s
scatters, so simulated figures are medians of several.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import median

import pytest

from bench.elastic.arms import Arm
from bench.elastic.trial import Slo, Trial
from bench.virtual.requests import Ask, Names, Session
from disagg_report.arrivals import Workload
from disagg_sim.step_model import H200, load_profile

SEEDS = range(9)
WITHIN = 0.2


@dataclass(frozen=True)
class Row:
    """A measurement; times in milliseconds: medians of TTFT and TPOT, p99 of the requests' longest gaps."""

    arm: Arm
    rate: float
    ttft: float
    tpot: float
    gap: float
    good: float


PLAIN, SPLIT = Arm("plain", 0, 2, "round_robin"), Arm("split", 1, 1, admits=False)
TENTH, FIFTH = replace(SPLIT, alone=0.1), replace(SPLIT, alone=0.2)
FITTED = (
    Row(PLAIN, 12, 46, 4.2, 42, 1.0), Row(PLAIN, 24, 47, 5.9, 46, 1.0),
    Row(SPLIT, 12, 61, 4.2, 9.5, 1.0), Row(SPLIT, 24, 104, 4.8, 10, 1.0),
)  # fmt: skip
PREDICTED = (
    Row(PLAIN, 32, 51, 7.8, 77, 0.91), Row(PLAIN, 40, 120, 13.4, 118, 0.23),
    Row(SPLIT, 32, 185, 5.5, 25, 1.0), Row(SPLIT, 40, 1001, 5.6, 14, 0.03),
    Row(TENTH, 32, 141, 6.4, 49, 1.0), Row(FIFTH, 32, 117, 7.2, 45, 1.0),
)  # fmt: skip


UNMET = {
    (
        "plain",
        24,
        0.0,
    ): "46 ms, simulated 66: in nearly every run two prompts share a step, as in the measurement at 32",
    ("1P1D", 32, 0.0): "25 ms, simulated 12: it was 14 at 40 requests/s, where decode has at least as much to do",
}
"""Gaps that were measured and are not predicted within :data:`WITHIN`, with both figures."""


def requests(seed: int, rate: float) -> list[Session]:
    """Arrivals of the measurement: their number is fixed."""
    names, times = Names(), Workload("m", 2000, 128, 8.0, seed).arrival_times(rate)
    return [[Ask(at, names.new(2000), 2000, 128, 0, session)] for session, at in enumerate(times)]


@lru_cache
def simulated(arm: Arm, rate: float) -> dict[str, float]:
    """Medians over the seeds."""
    found = []
    for seed in SEEDS:
        trial = Trial(arm, load_profile(H200), seed, Slo())
        trial.run(requests(seed, rate))
        found.append(trial.figures(0.0, 9.0))
    return {name: median(one[name] for one in found) for name in found[0]}


def name(row: Row) -> str:
    return f"{row.arm.name}-{row.arm.alone:g}-{row.rate:g}"


@pytest.mark.parametrize("row", FITTED + PREDICTED, ids=name)
def test_latencies_are_those_measured(row: Row) -> None:
    found = simulated(row.arm, row.rate)
    assert found["ttft_p50_ms"] == pytest.approx(row.ttft, rel=WITHIN)
    assert found["tpot_p50_ms"] == pytest.approx(row.tpot, rel=WITHIN)


@pytest.mark.parametrize("row", FITTED + PREDICTED, ids=name)
def test_the_longest_gaps_are_those_measured(row: Row) -> None:
    met = simulated(row.arm, row.rate)["longest_gap_p99_ms"] == pytest.approx(row.gap, rel=WITHIN)
    assert met is ((row.arm.name, row.rate, row.arm.alone) not in UNMET)


@pytest.mark.parametrize("row", FITTED + PREDICTED, ids=name)
def test_the_share_of_good_requests_is_that_measured(row: Row) -> None:
    assert simulated(row.arm, row.rate)["good"] == pytest.approx(row.good, abs=WITHIN)
