"""How many engines of a role there should be, from what the proxies measured since the last look.

Serve's own metric, requests in its handles, is always 0 here, because no request passes through them. Prefill is judged
by the time to first token against the SLO, decode by its share of busy slots and the inter-token latency. Each becomes
a **pressure**: 1 is the most that the role should carry. Requests in the proxies' queue wait for decode slots.

The functions are pure. Serve holds a decision for ``up_s`` or ``down_s`` before it acts, and takes an engine out only
after its drain (disagg_ray/replica.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from disagg_ray.settings import Slo

BUSY_SHARE = 0.8
"""Of decode's slots, from which on there should be another decode."""

IDLE_PRESSURE = 0.7
"""Pressure that the engines that stay may have after one has left."""

_MAX_STEP = 2.0
"""Most times that the number of engines grows in one decision."""

_QUANTILE = 0.9
_PREFIX = "disagg_proxy_"
_TTFT, _GAP = f"{_PREFIX}time_to_first_token_seconds", f"{_PREFIX}inter_token_latency_seconds"


@dataclass
class Figures:
    """What several proxies say together.

    Attributes:
        ttft, gap: cumulative counts of seconds by upper bound, since the proxies' start.
        queued: requests that wait for a slot.
        in_flight: requests on all decodes.
    """

    ttft: Counter[float] = field(default_factory=Counter)
    gap: Counter[float] = field(default_factory=Counter)
    queued: float = 0.0
    in_flight: float = 0.0


def read_metrics(texts: Iterable[str]) -> Figures:
    """The figures in ``/metrics`` of each proxy."""
    figures = Figures()
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"{_TTFT}_bucket":
                    figures.ttft[float(sample.labels["le"])] += int(sample.value)
                elif sample.name == f"{_GAP}_bucket":
                    figures.gap[float(sample.labels["le"])] += int(sample.value)
                elif sample.name == f"{_PREFIX}requests_queued":
                    figures.queued += sample.value
                elif sample.name == f"{_PREFIX}instance_in_flight" and sample.labels["role"] == "decode":
                    figures.in_flight += sample.value
    return figures


def quantile(now: Mapping[float, int], before: Mapping[float, int]) -> float:
    """The 90th percentile of what was counted in between, as its bucket's upper bound in seconds; 0 without a value.

    A proxy that was restarted counts from 0 again: what it counted until then is left out.
    """
    counts = {bound: now[bound] - before.get(bound, 0) for bound in sorted(now)}
    if any(count < 0 for count in counts.values()):
        counts = dict(sorted(now.items()))
    total = max(counts.values(), default=0)
    finite = [bound for bound in counts if math.isfinite(bound)]
    for bound, count in counts.items():
        if total and count >= _QUANTILE * total:
            return bound if math.isfinite(bound) else 2 * max(finite, default=0.0)
    return 0.0


def prefill_pressure(now: Figures, before: Figures, slo: Slo) -> float:
    """Pressure of the prefills. A TTFT that is long because requests wait for decode slots is not theirs."""
    latency = quantile(now.ttft, before.ttft) * 1000 / slo.ttft_ms
    return min(1.0, latency) if now.queued else latency


def decode_latency(now: Figures, before: Figures, slo: Slo) -> float:
    """Inter-token latency as a multiple of the SLO."""
    return quantile(now.gap, before.gap) * 1000 / slo.itl_ms


def decode_load(now: Figures, slots: int) -> float:
    """How many decodes the requests would fill, those in the queue included.

    Args:
        slots: requests that one decode may have at once.
    """
    return (now.in_flight + now.queued) / max(1, slots)


def decode_pressure(load: float, latency: float, count: int) -> float:
    """Pressure of ``count`` decodes.

    Args:
        load: see :func:`decode_load`.
        latency: inter-token latency as a multiple of the SLO.
    """
    return max(load / max(1, count) / BUSY_SHARE, latency)


def wanted(count: int, pressure: float) -> int:
    """How many engines there should be instead of ``count``; at least 1."""
    if pressure > 1:
        return max(count + 1, math.ceil(count * min(pressure, _MAX_STEP)))
    if count > 1 and pressure * count / (count - 1) < IDLE_PRESSURE:
        return count - 1
    return max(1, count)
