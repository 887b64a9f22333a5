"""Conclusions from the figures: the capacity of each setup, and which one is highest. Pure.

A setup's *capacity* is its highest goodput among the rates at which it kept the SLO. Capacities that differ by less
than 5 % count as equal: a sweep knows a limit to a quarter, and a rate has a few hundred requests at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disagg_report.figures import MIN_FOR_P99, Figures, figures
from disagg_report.folder import Report, Setup
from disagg_report.placed import shares

EQUAL_WITHIN = 0.05
ELASTIC = "elastic"
"""Kind of the setup whose proxy chooses for each request where it is prefilled."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one setup.

    Attributes:
        best: the kept rate with the highest goodput; None if none was kept.
        reached: a higher rate than the best was tried and not kept, so the limit is known.
    """

    setup: Setup
    rates: tuple[Figures, ...]
    best: Figures | None
    reached: bool

    @property
    def capacity(self) -> float:
        """Good requests per second."""
        return self.best.goodput if self.best else 0.0


def outcomes(report: Report) -> list[Outcome]:
    """Results of the setups in their order. Interrupted rates are ignored."""
    found = []
    for result in report.setups:
        rates = tuple(figures(measured, report.header.slo) for measured in result.rates)
        complete = [one for one in rates if not one.interrupted]
        best = max((one for one in complete if one.kept), key=lambda one: one.goodput, default=None)
        reached = any(not one.kept and (best is None or one.rate > best.rate) for one in complete)
        found.append(Outcome(result.setup, rates, best, reached))
    return found


def verdict(report: Report) -> str:
    """One sentence, followed by its reservations."""
    all_of_them = [one for one in outcomes(report) if one.rates]
    if not all_of_them:
        return "Nothing was measured."
    elastic = next((one for one in all_of_them if one.setup.kind == ELASTIC), None)
    if elastic is not None:
        sentence = _elastic(elastic, all_of_them)
    else:
        sentence = _single(all_of_them[0]) if len(all_of_them) == 1 else _compared(all_of_them)
    return " ".join([sentence, *_doubts(all_of_them)])


def _single(one: Outcome) -> str:
    if one.best is None:
        return f"{one.setup.title} kept the SLO at no rate that was tried."
    kept = f"{one.best.rate:g}/s"
    return f"{one.setup.title} serves {one.capacity:.2f} requests/s within the SLO (highest rate kept: {kept})."


def _elastic(one: Outcome, every: Sequence[Outcome]) -> str:
    """What elastic placement chose, and what the best static split and plain engines served instead."""
    title = one.setup.title
    if one.best is None:
        parts = [f"{title} kept the SLO at no rate that was tried"]
    else:
        chose = f"; at {one.best.rate:g}/s it chose: {placed}" if (placed := shares(one.best.placed)) else ""
        parts = [f"{title} serves {one.capacity:.2f} requests/s within the SLO{chose}"]
    splits = [other for other in every if other.setup.kind == "pd"]
    plain = [other for other in every if other.setup.kind == "plain"]
    for name, found in (("the best static split", splits), ("plain engines", plain)):
        best = max(found, key=lambda other: other.capacity, default=None)
        if best is None:
            parts.append(f"{name}: not measured")
        elif best.best is None:
            parts.append(f"{name}: the SLO was kept at no rate that was tried")
        else:
            parts.append(f"{name} ({best.setup.title}): {best.capacity:.2f}{_relative(one, best)}")
    return "; ".join(parts) + ". All figures are measured."


def _relative(one: Outcome, other: Outcome) -> str:
    """How much more or fewer requests ``one`` serves; nothing where it serves none."""
    if one.best is None:
        return ""
    ratio = one.capacity / other.capacity
    if abs(ratio - 1) <= EQUAL_WITHIN:
        return ", as many as far as this can tell"
    return f", so elastic serves {ratio:.2f} times as many"


def _compared(every: Sequence[Outcome]) -> str:
    ranked = sorted(every, key=lambda one: -one.capacity)
    first, second = ranked[0], ranked[1]
    if first.best is None:
        return "None of the setups kept the SLO at a rate that was tried."
    others = ", ".join(f"{one.setup.title} {one.capacity:.2f}" for one in ranked[1:])
    if second.capacity >= first.capacity * (1 - EQUAL_WITHIN):
        equal = [one.setup.title for one in ranked if one.capacity >= first.capacity * (1 - EQUAL_WITHIN)]
        return (
            f"{' and '.join(equal)} serve equally many requests within the SLO as far as this can tell:"
            f" {first.capacity:.2f} requests/s ({others})."
        )
    more = f", {first.capacity / second.capacity:.2f} times as many as the next" if second.best else ""
    return (
        f"Most requests within the SLO are served by {first.setup.title}: {first.capacity:.2f} requests/s{more}"
        f" ({others})."
    )


def _doubts(every: Sequence[Outcome]) -> list[str]:
    doubts = []
    if open_ended := [one.setup.title for one in every if one.best and not one.reached]:
        doubts.append(f"The limit was not reached with {', '.join(open_ended)}: higher rates may be served too.")
    if few := [one.setup.title for one in every if one.best and one.best.sent < MIN_FOR_P99]:
        doubts.append(
            f"Fewer than {MIN_FOR_P99} requests stand behind the figure of {', '.join(few)}: more BENCH_SECONDS make"
            " it firm."
        )
    return doubts
