"""From the load generator's slices to figures: which seconds are clean, and what they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Slice = dict[str, Any]

_FOREIGN_PROXY = 0.08
"""Share of the proxy's core that others may have in a clean second."""

_FOREIGN_LOAD = {"cpu": 0.6, "delay": 0.15}
"""The same for the load's core: work there hardly changes the proxy's CPU time, but it delays what is timed there."""

_STOLEN = {"cpu": 0.6, "delay": 0.08}
"""Seconds that the hypervisor took from both cores."""


def clean(slices: Sequence[Slice], purpose: str) -> list[Slice]:
    """Those in which little else ran; for delays the second before must have been clean as well.

    Args:
        purpose: "cpu" or "delay".
    """
    good = [_is_clean(one, purpose) for one in slices]
    if purpose == "delay":
        good = [now and (index == 0 or good[index - 1]) for index, now in enumerate(good)]
    return [one for one, keep in zip(slices, good, strict=True) if keep]


def _is_clean(one: Slice, purpose: str) -> bool:
    seconds: float = one["seconds"]
    foreign_proxy: float = one["busy"][0] - sum(one["proxy"])
    foreign_load: float = one["busy"][1] - sum(one["load"]) - sum(one["engine"])
    stolen: float = sum(one["stolen"])
    return (
        foreign_proxy <= _FOREIGN_PROXY * seconds
        and foreign_load <= _FOREIGN_LOAD[purpose] * seconds
        and stolen <= _STOLEN[purpose] * seconds
    )


def floor_us(number: int) -> float:
    """The least time of a class of histogram.h."""
    if number < 128:
        return number / 10
    octave, step = divmod(number - 128, 64)
    return float((64 + step) << (octave + 1)) / 10


def percentiles(histograms: Iterable[Sequence[Sequence[int]]]) -> dict[str, float] | None:
    """p50 and p99 in us of what all of them counted; None when that is nothing."""
    total: Counter[int] = Counter()
    for histogram in histograms:
        for number, count in histogram:
            total[number] += count
    if not total:
        return None
    found: dict[str, float] = {"n": sum(total.values())}
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        left = share * (found["n"] - 1)
        for number in sorted(total):
            left -= total[number]
            if left < 0:
                break
        found[name] = floor_us(number)
    return found


def figures(slices: Sequence[Slice], unit: str, *, all_of_them: bool = False) -> dict[str, Any]:
    """CPU per unit, rate, memory and delays.

    Args:
        unit: "request" or "token"; "stream" for memory.
        all_of_them: take noisy seconds too.
    """
    counted = list(slices) if all_of_them else clean(slices, "cpu")
    timed = list(slices) if all_of_them else clean(slices, "delay")
    seconds = sum(one["seconds"] for one in counted)
    cpu = sum(sum(one["proxy"]) for one in counted)
    found: dict[str, Any] = {"seconds": len(slices), "clean": len(counted), "clean_delay": len(timed)}
    if unit != "stream":
        units = sum(one[unit + "s"] for one in counted)
        found["cpu_us"] = round(1e6 * cpu / units, 3) if units else None
        found["rate"] = round(units / seconds, 1) if seconds else None
        found["cpu_share"] = round(cpu / seconds, 4) if seconds else None
        found["system_share"] = round(sum(one["proxy"][1] for one in counted) / cpu, 3) if cpu else None
    elif slices:
        found["rss_kb"] = max(one["rss_kb"] for one in slices)
        found["open"] = min(one["open"] for one in slices)
    for name in ("ttft", "delay", "latency"):
        found[name + "_us"] = percentiles(one[name] for one in timed)
    return found
