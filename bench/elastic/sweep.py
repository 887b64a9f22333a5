"""Rates, knees and goals: which trials are run, and what follows from them."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from bench.elastic.arms import Arm
from bench.elastic.bound import bounds
from bench.elastic.trial import Slo, Trial
from bench.elastic.workloads import arrivals
from disagg_sim.step_model import load_profile

SHARE = 0.9
"""Share of the requests that are good up to the knee."""

_FIRST, _STEP, _LAST = 0.3, 0.1, 1.1
"""Rates that are tried, as shares of the upper bound."""

_ENOUGH = 0.75
"""Share of good requests below which no higher rate is tried."""

_HALVINGS = 3
"""Steps of the search for the knee between two of these: it is known within 1.25 % of the upper bound."""

Point = dict[str, float]
"""Figures at one rate, means over the seeds."""

PACES = ("equal", "unequal", "changed")
"""``equal``: as the profile says. ``unequal``: every second engine takes 30 % longer. ``changed``: all do so from the
middle of a run on, of which only that part counts."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What all trials have in common.

    Attributes:
        profile: name or file. kv_tokens: size of an engine's KV cache; 0: the profile's.
        seconds: arrivals of one trial. warm_up: at the start, not counted.
    """

    profile: str
    kv_tokens: int
    seconds: float
    warm_up: float
    seeds: int
    slo: Slo


@dataclass(frozen=True, slots=True)
class Series:
    """One arm under one workload."""

    workload: str
    gpus: int
    arm: Arm
    paces: str = "equal"
    overload: bool = False


def measure(task: tuple[Settings, Series]) -> dict[str, Any]:
    """Try rates until too many requests miss the SLO, then search for the knee."""
    settings, series = task
    # Trials are large and live until their end: collected between them instead.
    gc.disable()
    profile = load_profile(settings.profile)
    if settings.kv_tokens:
        profile = replace(profile, kv_cache_tokens=settings.kv_tokens)
    bound, day = bounds(profile, series.workload, series.gpus, settings.slo.tpot)
    points: list[Point] = []

    def at(rate: float) -> Point:
        figures = [_one(settings, series, profile, rate, seed, day) for seed in range(settings.seeds)]
        point = {name: mean(one[name] for one in figures) for name in figures[0]}
        points.append({"rate": rate, "goodput": rate * point["good"], **point})
        points.sort(key=lambda one: one["rate"])
        return point

    share = _FIRST
    while share <= _LAST + 1e-9 and at(share * bound)["good"] >= _ENOUGH:
        share += _STEP
    for _ in range(_HALVINGS):
        kept = [one["rate"] for one in points if one["good"] >= SHARE]
        missed = [one["rate"] for one in points if one["good"] < SHARE and one["rate"] > max(kept, default=0.0)]
        if not kept or not missed:
            break
        at((max(kept) + min(missed)) / 2)
    found: dict[str, Any] = {
        "workload": series.workload, "gpus": series.gpus, "arm": series.arm.name, "paces": series.paces,
        "bound": bound, "knee": knee(points), "points": points,
    }  # fmt: skip
    if series.overload and found["knee"]:
        beyond = at(1.5 * found["knee"])
        near = at(found["knee"])
        found["overload"] = {
            "goodput": 1.5 * beyond["good"] / max(near["good"], 1e-9), "twice": beyond["twice"],
            "refused": beyond["refused"],
        }  # fmt: skip
    return found


def _one(settings: Settings, series: Series, profile: Any, rate: float, seed: int, day: tuple[float, float]) -> Point:
    seconds, begin, paces, changes = settings.seconds, settings.warm_up, None, 0.0
    if series.paces != "equal":
        slow = [1.3 if series.paces == "changed" or at % 2 else 1.0 for at in range(series.gpus)]
        paces = slow
    if series.paces == "changed":
        changes = begin + (seconds - begin) / 2
        begin = changes
    trial = Trial(series.arm, profile, seed, settings.slo, paces, changes)
    trial.run(arrivals(series.workload, seed, seconds, rate, day))
    found = trial.figures(begin, seconds)
    del trial
    gc.collect()
    return found


def knee(points: Sequence[Point]) -> float:
    """The highest rate at which :data:`SHARE` of the requests are good; 0 if there is none.

    Between the last rate that was kept and the next one, the share is taken to fall linearly.
    """
    kept = [one for one in points if one["good"] >= SHARE]
    if not kept:
        return 0.0
    last = kept[-1]
    following = next((one for one in points if one["rate"] > last["rate"]), None)
    if following is None:
        return last["rate"]
    part = (last["good"] - SHARE) / (last["good"] - following["good"])
    return last["rate"] + part * (following["rate"] - last["rate"])


def goals(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each workload, number of GPUs and paces: elastic beside the best of the others."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in results:
        groups.setdefault((one["workload"], one["gpus"], one["paces"]), []).append(one)
    rows = []
    for (workload, gpus, paces), same in groups.items():
        elastic = next((one for one in same if one["arm"] == "elastic"), None)
        others = [one for one in same if one["arm"] != "elastic"]
        if elastic is None or not others:
            continue
        best = max(others, key=lambda one: one["knee"])
        plain = next(one for one in others if one["arm"] == "plain")
        low, base = elastic["points"][0], plain["points"][0]
        rows.append({
            "workload": workload, "gpus": gpus, "paces": paces, "best": best["arm"], "best_knee": best["knee"],
            "knee": elastic["knee"], "ratio": elastic["knee"] / best["knee"] if best["knee"] else float("inf"),
            "of_bound": elastic["knee"] * SHARE / elastic["bound"],
            "low_load_ttft": low["ttft_p50_ms"] / base["ttft_p50_ms"] if base["ttft_p50_ms"] else 0.0,
        })  # fmt: skip
    return rows
