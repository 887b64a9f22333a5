"""Figures of one rate, computed from its requests. Pure.

Goodput at a rate is the rate times the share of its requests that met the SLO, so that waiting for the last responses
does not lower it. (``vllm bench serve`` divides by the total time instead.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disagg_report.records import Measurement, Power
from disagg_report.slo import Slo

_MIN_DUE = 10

MIN_FOR_P99 = 100
"""With fewer values the 99th percentile is the maximum, and is marked as such."""


def quantile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that at least ``share`` of the sorted, non-empty values do not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def percentile(values: Sequence[float], share: float) -> float | None:
    """:func:`quantile` of values in any order; None without values."""
    return quantile(sorted(values), share) if values else None


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one rate.

    Attributes:
        sent, answered, good: numbers of requests; good: within the SLO.
        throughput: responses per second, until the last one.
        goodput: good requests per second.
        kept: enough requests were good.
        ttft_ms, tpot_ms: p50 and p99 of the answered requests.
        itl_ms: p50 and p99 of the gaps between token events of all requests.
        output_tokens_per_s: until the last response.
        joules_per_token: energy of a role's GPUs per output token.
        late_ms: p99 of the load generator's delay in sending; None if unknown.
        placed: as in :class:`Measurement`.
    """

    rate: float
    sent: int
    answered: int
    good: int
    throughput: float
    goodput: float
    kept: bool
    ttft_ms: tuple[float | None, float | None]
    tpot_ms: tuple[float | None, float | None]
    itl_ms: tuple[float | None, float | None]
    output_tokens_per_s: float
    power: dict[str, Power]
    joules_per_token: dict[str, float]
    late_ms: float | None
    client_cpu: float | None
    interrupted: bool
    errors: tuple[str, ...]
    placed: dict[str, int]

    @property
    def share(self) -> float:
        """Share of the requests sent that were good."""
        return self.good / self.sent if self.sent else 0.0


def _both(values: Sequence[float]) -> tuple[float | None, float | None]:
    return percentile(values, 0.5), percentile(values, 0.99)


def figures(measured: Measurement, slo: Slo) -> Figures:
    """Compute the figures of one measurement."""
    answered = [shot for shot in measured.shots if shot.answered]
    good = sum(slo.good(shot) for shot in measured.shots)
    sent = len(measured.shots)
    tokens = sum(shot.output_tokens for shot in answered)
    share = good / sent if sent else 0.0
    late = [shot.late_ms for shot in measured.shots if shot.late_ms is not None]
    return Figures(
        rate=measured.rate,
        sent=sent,
        answered=len(answered),
        good=good,
        throughput=len(answered) / measured.seconds if measured.seconds else 0.0,
        goodput=measured.rate * share,
        kept=share >= slo.attainment,
        ttft_ms=_both([shot.ttft_ms for shot in answered if shot.ttft_ms is not None]),
        tpot_ms=_both([shot.tpot_ms for shot in answered if shot.output_tokens > 1]),
        itl_ms=_both([gap for shot in answered for gap in shot.itl_ms]),
        output_tokens_per_s=tokens / measured.seconds if measured.seconds else 0.0,
        power=measured.power,
        joules_per_token={role: one.joules / tokens for role, one in measured.power.items() if tokens},
        late_ms=percentile(late, 0.99),
        client_cpu=measured.client_cpu,
        interrupted=measured.interrupted,
        errors=tuple(sorted({shot.error for shot in measured.shots if shot.error}))[:3],
        placed=measured.placed,
    )


def saturated(measured: Measurement, quiet_ms: float | None) -> bool:
    """Whether responses fall behind arrivals.

    That is: more than a fifth of the requests which would be answered by the last arrival, if each took ``quiet_ms``
    (the latency at the lowest rate), are not. False if unknown: fewer than ten such requests, or a load generator that
    does not report when it sent.
    """
    sent = [shot.sent for shot in measured.shots]
    if quiet_ms is None or not sent or None in sent:
        return False
    last = max(one for one in sent if one is not None)
    due = sum(one is not None and one + quiet_ms / 1e3 <= last for one in sent)
    answered = (shot for shot in measured.shots if shot.answered)
    there = sum((shot.sent or 0.0) + (shot.latency_ms or 0.0) / 1e3 <= last for shot in answered)
    return due >= _MIN_DUE and there < 0.8 * due
