"""Figures from shots: quantiles of both arms, their difference, and how sure it is. Pure.

Inter-token latency is the time between two successive events of a stream. The intervals are percentile bootstrap
intervals of 95 %: whole requests are drawn, with all their tokens, since the tokens of one are not independent. At
low rates pairs are drawn, at saturating ones requests of each arm by themselves.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from bench.gpu_latency.arms import Shot
from bench.gpu_latency.load import ARMS, Block
from disagg_report.figures import quantile

QUANTILES = (0.5, 0.99)
_DRAWS = 1000
_MOST_STEPS = 2e7


@dataclass(frozen=True)
class Sample:
    """What one request gives: milliseconds."""

    cluster: int
    values: tuple[float, ...]


def ttft(shot: Shot) -> float:
    """Milliseconds to the first event with a token."""
    return (shot.arrivals[0] - shot.sent) * 1e3


def gaps(shot: Shot, end: float = float("inf")) -> tuple[float, ...]:
    """Milliseconds between events that arrived by ``end``."""
    times = [one for one in shot.arrivals if one <= end]
    return tuple((later - earlier) * 1e3 for earlier, later in pairwise(times))


class Resampled:
    """Quantiles of a sample whose clusters are drawn again and again."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        pairs = sorted((value, sample.cluster) for sample in samples for value in sample.values)
        self.values = [value for value, _ in pairs]
        self._clusters = [cluster for _, cluster in pairs]

    def at(self, weights: dict[int, int]) -> list[float]:
        """``QUANTILES`` where cluster ``c`` counts ``weights[c]`` times."""
        running = list(accumulate(weights.get(cluster, 0) for cluster in self._clusters))
        if not running or not running[-1]:
            return []
        return [self.values[bisect_left(running, share * running[-1])] for share in QUANTILES]


def compare(direct: Sequence[Sample], proxy: Sequence[Sample], paired: bool, seed: int = 7) -> dict[str, Any]:
    """Quantiles of both arms and proxy minus direct, with its interval; ``paired``: clusters mean the same in both."""
    arms = [Resampled(direct), Resampled(proxy)]
    if not arms[0].values or not arms[1].values:
        return {}
    found = [[quantile(arm.values, share) for share in QUANTILES] for arm in arms]
    ids = [sorted({sample.cluster for sample in samples}) for samples in (direct, proxy)]
    draws = max(100, min(_DRAWS, int(_MOST_STEPS / (len(arms[0].values) + len(arms[1].values)))))
    dice, differences = random.Random(seed), []
    for _ in range(draws):
        weights = [_weights(dice, ids[0])]
        weights.append(weights[0] if paired else _weights(dice, ids[1]))
        one, two = arms[0].at(weights[0]), arms[1].at(weights[1])
        if one and two:
            differences.append([b - a for a, b in zip(one, two, strict=True)])
    result: dict[str, Any] = {}
    for place, share in enumerate(QUANTILES):
        drawn = sorted(one[place] for one in differences)
        result[f"p{share * 100:g}"] = {
            "direct": round(found[0][place], 3),
            "proxy": round(found[1][place], 3),
            "difference": round(found[1][place] - found[0][place], 3),
            "interval": [round(quantile(drawn, 0.025), 3), round(quantile(drawn, 0.975), 3)],
        }
    return result


def _weights(dice: random.Random, ids: Sequence[int]) -> dict[int, int]:
    weights: dict[int, int] = {}
    for one in dice.choices(ids, k=len(ids)):
        weights[one] = weights.get(one, 0) + 1
    return weights


def median_of_pairs(differences: Sequence[float], seed: int = 7) -> dict[str, Any]:
    """The median of differences within pairs, with its interval."""
    if not differences:
        return {}
    dice = random.Random(seed)
    medians = sorted(quantile(sorted(dice.choices(differences, k=len(differences))), 0.5) for _ in range(_DRAWS))
    return {
        "median": round(quantile(sorted(differences), 0.5), 3),
        "interval": [round(quantile(medians, 0.025), 3), round(quantile(medians, 0.975), 3)],
        "pairs": len(differences),
    }


def figures(shots: Sequence[Shot], blocks: Sequence[Block] = ()) -> dict[str, Any]:
    """Everything of one phase; ``blocks`` where it was a saturating one."""
    good = [shot for shot in shots if not shot.error and shot.arrivals]
    if blocks:
        good = [shot for shot in good if blocks[shot.place].begin <= shot.sent <= blocks[shot.place].end]
    result: dict[str, Any] = {"requests": {}, "errors": {}}
    for name in ARMS:
        result["requests"][name] = sum(shot.arm == name for shot in good)
        result["errors"][name] = sum(shot.arm == name and bool(shot.error) for shot in shots)
    result["error_examples"] = sorted({shot.error for shot in shots if shot.error})[:5]
    if not blocks:
        complete = {
            place for place in {shot.place for shot in good} if sum(shot.place == place for shot in good) == len(ARMS)
        }
        good = [shot for shot in good if shot.place in complete]
    ends = [block.end for block in blocks]
    cluster = {id(shot): number if blocks else shot.place for number, shot in enumerate(good)}

    def samples(name: str, inter_token: bool) -> list[Sample]:
        return [
            Sample(cluster[id(shot)], gaps(shot, ends[shot.place] if ends else float("inf")) if inter_token
                   else (ttft(shot),))
            for shot in good if shot.arm == name
        ]  # fmt: skip

    result["ttft_ms"] = compare(samples("direct", False), samples("proxy", False), not blocks)
    result["itl_ms"] = compare(samples("direct", True), samples("proxy", True), not blocks)
    if blocks:
        result["blocks"] = [_block(place, block, shots, good) for place, block in enumerate(blocks)]
        result["tokens_per_s"] = {
            name: round(sum(one["tokens_per_s"] for one in mine) / len(mine), 1)
            for name in ARMS
            if (mine := [one for one in result["blocks"] if one["arm"] == name])
        }
    else:
        by_place = {(shot.place, shot.arm): shot for shot in good}
        places = sorted({shot.place for shot in good})
        both = [tuple(by_place[place, name] for name in ARMS) for place in places]
        result["paired_ttft_ms"] = median_of_pairs([ttft(two) - ttft(one) for one, two in both])
        result["paired_mean_itl_ms"] = median_of_pairs([_mean_gap(two) - _mean_gap(one) for one, two in both])
    legs = sorted(shot.prefill * 1e3 for shot in good if shot.prefill)
    result["direct_prefill_leg_ms"] = {"p50": round(quantile(legs, 0.5), 2)} if legs else {}
    return result


def _mean_gap(shot: Shot) -> float:
    return (shot.arrivals[-1] - shot.arrivals[0]) * 1e3 / max(1, len(shot.arrivals) - 1)


def _block(place: int, block: Block, shots: Sequence[Shot], good: Sequence[Shot]) -> dict[str, Any]:
    arrived = sum(
        block.begin <= moment <= block.end for shot in shots if shot.place == place for moment in shot.arrivals
    )
    mine = [shot for shot in good if shot.place == place]
    firsts = sorted(map(ttft, mine))
    between = sorted(value for shot in mine for value in gaps(shot, block.end))
    seconds = block.end - block.begin
    return {
        "arm": block.arm,
        "seconds": round(seconds, 2),
        "requests": len(mine),
        "tokens_per_s": round(arrived / seconds, 1),
        "ttft_p50_ms": round(quantile(firsts, 0.5), 2) if firsts else None,
        "itl_p50_ms": round(quantile(between, 0.5), 3) if between else None,
    }
