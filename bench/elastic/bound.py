"""An upper bound on the goodput of any placement on these GPUs, offline and with perfect knowledge.

A fluid relaxation of the step model. Of each request it asks only for the work that no schedule can avoid:

- its prompt tokens at the profile's pace, without the fixed part of a step, and with one prefix cache of all prompts
  that never forgets;
- its tokens after the first, each reading its context;
- a GPU that decodes runs at least ``1 / TPOT`` steps a second, each with its fixed part, and no more sequences than its
  KV cache holds at once.

There is no queue, no hand-over, no connector, no discreteness, and TTFT always holds. GPUs may differ and may share
their time between any two ways of working, so work is split as well as it can be. No arm can reach it: with Poisson
arrivals a prefill that is always busy has an infinite queue. It counts good requests, so it bounds goodput, not the
rate.
"""

from __future__ import annotations

from itertools import pairwise

from bench.elastic.workloads import DAY, Shape, shape
from disagg_sim.step_model import EngineProfile

_GRID = 200


def upper_bound(profile: EngineProfile, shape: Shape, gpus: int, tpot: float) -> float:
    """Requests per second within the SLO.

    Args:
        tpot: seconds per output token that the SLO permits.
    """
    doubles = profile.prefill_context_tokens
    prefill = profile.prefill_token_seconds * (shape.computed + (shape.attended / doubles if doubles else 0.0))
    hull = _concave([(share / _GRID, _tokens(profile, shape, share / _GRID, tpot)) for share in range(_GRID + 1)])
    low, high = 0.0, gpus / prefill
    for _ in range(60):
        middle = (low + high) / 2
        enough = _at(hull, middle * prefill / gpus) * gpus >= middle * shape.later
        low, high = (middle, high) if enough else (low, middle)
    return low


def bounds(profile: EngineProfile, workload: str, gpus: int, tpot: float) -> tuple[float, tuple[float, float]]:
    """The bound of a workload, and those of the begin and the end of the day.

    Over the day it is the mean of the bounds of its moments.
    """
    begin, end = (upper_bound(profile, shape(name), gpus, tpot) for name in DAY)
    if workload != "day":
        return upper_bound(profile, shape(workload), gpus, tpot), (begin, end)
    moments = [at / 20 for at in range(21)]
    mixes = [w * end / ((1 - w) * begin + w * end) for w in moments]
    each = [upper_bound(profile, shape(DAY[0]).mixed(shape(DAY[1]), mix), gpus, tpot) for mix in mixes]
    return sum(each) / len(each), (begin, end)


def _tokens(profile: EngineProfile, shape: Shape, prefill_share: float, tpot: float) -> float:
    """Most tokens a second that a GPU generates beside prefill that takes this share of its time."""
    context = shape.read / max(shape.later, 1e-9)
    each = profile.sequence_seconds + context * profile.context_token_seconds
    most = min(float(profile.max_num_seqs), profile.kv_cache_tokens / context) if context else profile.max_num_seqs
    left, steps = 1 - prefill_share, 1 / tpot
    if steps * profile.step_seconds > left:
        return 0.0
    # Tokens = steps x sequences, and steps x (fixed + sequences x each) = the time that is left. Fewer steps carry more
    # tokens, down to the least that the SLO permits and as far as the KV cache holds the sequences.
    sequences = (left / steps - profile.step_seconds) / each if each else most
    if sequences <= most:
        return steps * sequences
    return most * left / (profile.step_seconds + most * each)


def _concave(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Upper concave hull of points in ascending order."""
    hull: list[tuple[float, float]] = []
    for x, y in curve:
        while len(hull) > 1:
            (x1, y1), (x2, y2) = hull[-2:]
            if (y2 - y1) * (x - x2) > (y - y2) * (x2 - x1):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _at(hull: list[tuple[float, float]], x: float) -> float:
    for (x1, y1), (x2, y2) in pairwise(hull):
        if x <= x2:
            return y1 + (y2 - y1) * (x - x1) / (x2 - x1)
    return 0.0
