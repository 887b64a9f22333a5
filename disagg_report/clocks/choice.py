"""What a sweep says: the energy of each role over its clock, and the clock to set. Pure.

The best clock is the one with the least energy per token among those that kept the SLO in most of their rounds. Figures
are medians over the rounds; throttled runs count only where there are no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from disagg_report.clocks.runs import DEFAULT, SWEEP, VERIFY, Result

EQUAL_WITHIN = 0.01
"""Energies that differ by less count as equal; the higher clock is chosen then, which leaves more room in the SLO."""


@dataclass(frozen=True, slots=True)
class Point:
    """One clock of one role, or default clocks.

    Attributes:
        mhz: None for the default.
        lowest, highest: joules per token of the rounds.
        throttled: only throttled runs stand behind it.
    """

    mhz: int | None
    joules_per_token: float
    lowest: float
    highest: float
    requests_per_wh: float
    ttft_ms: float | None
    tpot_ms: float | None
    share: float
    kept: bool
    rounds: int
    throttled: bool


@dataclass(frozen=True, slots=True)
class Curve:
    """One role: its points in the order of clocks, the default, and the best point; None when none kept the SLO."""

    role: str
    points: tuple[Point, ...]
    default: Point | None
    best: Point | None

    @property
    def saving(self) -> float | None:
        """Share of the role's energy per token that the best clock saves against the default."""
        if self.best is None or self.default is None or not self.default.joules_per_token:
            return None
        return 1 - self.best.joules_per_token / self.default.joules_per_token


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def point(results: Sequence[Result], role: str, mhz: int | None) -> Point | None:
    """The rounds of one clock together; None when nothing was measured."""
    clean = [one for one in results if not one.throttled]
    used = clean or list(results)
    joules = [value for one in used if (value := one.joules_per_token(role)) is not None]
    if not joules:
        return None
    return Point(
        mhz,
        median(joules),
        min(joules),
        max(joules),
        median(one.requests_per_wh for one in used),
        _middle([one.ttft_ms[1] for one in used]),
        _middle([one.tpot_ms[1] for one in used]),
        median(one.share for one in used),
        2 * sum(one.kept for one in used) > len(used),
        len(used),
        not clean,
    )


def curve(results: Sequence[Result], role: str) -> Curve:
    """The curve of one role."""
    mine = [one for one in results if one.run.kind == SWEEP and role in one.run.clocks]
    clocks = sorted({one.run.clocks[role] for one in mine})
    found = [point([one for one in mine if one.run.clocks[role] == mhz], role, mhz) for mhz in clocks]
    points = tuple(one for one in found if one is not None)
    default = point([one for one in results if one.run.kind == DEFAULT], role, None)
    kept = [one for one in points if one.kept]
    best: Point | None = None
    if kept:
        least = min(one.joules_per_token for one in kept)
        best = [one for one in kept if one.joules_per_token <= least * (1 + EQUAL_WITHIN)][-1]
    return Curve(role, points, default, best)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The clocks together.

    Attributes:
        chosen: MHz by role; empty when no clock kept the SLO.
        verified, default: requests per Wh with the chosen clocks and with default ones, measured one after the other.
        kept: whether the chosen clocks kept the SLO together; None before the verification.
    """

    chosen: dict[str, int]
    verified: float | None
    default: float | None
    kept: bool | None

    @property
    def saving(self) -> float | None:
        """Share of the energy of a request that the chosen clocks save, by the verification."""
        return None if not self.verified or not self.default else 1 - self.default / self.verified


def chosen_clocks(results: Sequence[Result], roles: Sequence[str]) -> dict[str, int]:
    """The best clock of each role that has one."""
    best = {role: curve(results, role).best for role in roles}
    return {role: one.mhz for role, one in best.items() if one is not None and one.mhz is not None}


def judge(results: Sequence[Result], roles: Sequence[str]) -> Verdict:
    """What to set, and what it saves."""
    verified = [one for one in results if one.run.kind == VERIFY]
    default = [one for one in results if one.run.kind == DEFAULT]
    return Verdict(
        dict(verified[0].run.clocks) if verified else chosen_clocks(results, roles),
        _middle([one.requests_per_wh for one in verified]),
        _middle([one.requests_per_wh for one in default]),
        2 * sum(one.kept for one in verified) > len(verified) if verified else None,
    )
