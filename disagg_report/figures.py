"""From requests to figures. Pure.

Goodput at a rate is that rate times the share of its requests that were good, so that the time in which the last
answers come does not lower it. (``vllm bench serve`` divides by the whole time instead.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disagg_report.records import Measurement, Power
from disagg_report.slo import Slo

_LEAST_DUE = 10

LEAST_FOR_P99 = 100
"""With fewer values the 99th percentile is just the largest, and is marked so."""


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least ``share`` of them do not exceed; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


@dataclass(frozen=True, slots=True)
class Figures:
    """One rate.

    Attributes:
        sent, answered, good: requests.
        throughput: answers per second, up to the last one.
        goodput: good requests per second.
        kept: enough of them were good.
        ttft_ms, tpot_ms: percentiles 50 and 99 of the answered requests.
        itl_ms: the same of all times between two events with tokens.
        output_tokens_per_s: up to the last answer.
        joules_per_token: energy of a role's GPUs per output token.
        late_ms: 99th percentile of how late the load generator was; None where it is not known.
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

    @property
    def share(self) -> float:
        """Of the requests sent, those that were good."""
        return self.good / self.sent if self.sent else 0.0


def _both(values: Sequence[float]) -> tuple[float | None, float | None]:
    return percentile(values, 0.5), percentile(values, 0.99)


def figures(measured: Measurement, slo: Slo) -> Figures:
    """The figures of one measurement."""
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
    )


def saturated(measured: Measurement, quiet_ms: float | None) -> bool:
    """Whether answers fall behind arrivals.

    Of the requests that would be answered by the last arrival if each took ``quiet_ms``, its time at the lowest rate,
    more than a fifth are not. False where that cannot be told: fewer than ten of them, or a load generator that does
    not say when it sent.
    """
    sent = [shot.sent for shot in measured.shots]
    if quiet_ms is None or not sent or None in sent:
        return False
    last = max(one for one in sent if one is not None)
    due = sum(one is not None and one + quiet_ms / 1e3 <= last for one in sent)
    answered = (shot for shot in measured.shots if shot.answered)
    there = sum((shot.sent or 0.0) + (shot.latency_ms or 0.0) / 1e3 <= last for shot in answered)
    return due >= _LEAST_DUE and there < 0.8 * due
