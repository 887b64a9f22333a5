"""Runs of a sweep over clocks: their order, and what one of them has shown. Pure.

With prefill and decode on GPUs of their own TTFT depends on prefill's clock and TPOT on decode's, so each role is swept
while the other one keeps its default: n + m runs in place of n x m, and one more that verifies both choices together.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from disagg_report.records import BadRecord

FORMAT = 1
DEFAULT, SWEEP, VERIFY = "default", "sweep", "verify"
"""Kinds of runs: default clocks, one role or all of them at a clock, the chosen clocks together."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run.

    Attributes:
        clocks: cap of the SM clock in MHz by role; a role without an entry keeps its default.
        swept: the role whose curve it belongs to; empty for default clocks and the verification.
    """

    kind: str
    round: int
    clocks: Mapping[str, int] = field(default_factory=dict)
    swept: str = ""

    def __str__(self) -> str:
        shown = ", ".join(f"{role} {mhz} MHz" for role, mhz in self.clocks.items()) or "default clocks"
        return f"{shown}, round {self.round + 1}"


@dataclass(frozen=True, slots=True)
class RoleEnergy:
    """The GPUs of one role during a run.

    Attributes:
        joules: from the energy counter, or where there is none the integral of power.
        counted: whether it is from the counter.
        hottest_c: None where it is not known.
        throttled: reasons that were seen in more than a tenth of the samples.
    """

    joules: float
    counted: bool
    hottest_c: float | None = None
    throttled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What a run has shown.

    Attributes:
        ttft_ms, tpot_ms: p50 and p99.
        share: of the requests within the SLO.
    """

    run: Run
    rate: float
    seconds: float
    answered: int
    prompt_tokens: int
    output_tokens: int
    ttft_ms: tuple[float | None, float | None]
    tpot_ms: tuple[float | None, float | None]
    share: float
    kept: bool
    energy: Mapping[str, RoleEnergy]

    @property
    def throttled(self) -> bool:
        """Whether its figures are not those of its clocks: a GPU was slowed down by heat, power or hardware."""
        return any(one.throttled for one in self.energy.values())

    @property
    def joules(self) -> float:
        """Of all roles."""
        return sum(one.joules for one in self.energy.values())

    @property
    def requests_per_wh(self) -> float:
        """Answered requests per watt-hour."""
        return self.answered / (self.joules / 3600) if self.joules else 0.0

    def joules_per_token(self, role: str) -> float | None:
        """Of prefill per prompt token, of decode per output token, of plain engines per output token."""
        tokens = self.prompt_tokens if role == "prefill" else self.output_tokens
        return self.energy[role].joules / tokens if tokens and role in self.energy else None

    def to_json(self) -> dict[str, Any]:
        """What :func:`result_of` reads."""
        return asdict(self)


def result_of(value: dict[str, Any], where: str) -> Result:
    """The inverse of :meth:`Result.to_json`. Raises BadRecord."""
    try:
        energy = {
            role: RoleEnergy(**{**one, "throttled": tuple(one["throttled"])}) for role, one in value["energy"].items()
        }
        pairs = {name: tuple(value[name]) for name in ("ttft_ms", "tpot_ms")}
        return Result(**{**value, **pairs, "run": Run(**value["run"]), "energy": energy})
    except (KeyError, TypeError, AttributeError) as error:
        raise BadRecord(f"{where}: not a run of this report ({type(error).__name__}: {error})") from None


def plan(clocks: Mapping[str, Sequence[int]], rounds: int, seed: int, *, together: bool = False) -> list[Run]:
    """The runs in order: rounds of all of them, each in an order of its own, so that heat and drift hit none more.

    Args:
        clocks: those to try, by role.
        together: all roles get the same clock in a run: for a comparison at equal clocks.
    """
    dice = random.Random(seed)
    runs: list[Run] = []
    for number in range(rounds):
        one = [Run(DEFAULT, number)]
        if together:
            common = sorted(set.intersection(*(set(some) for some in clocks.values())))
            one += [Run(SWEEP, number, dict.fromkeys(clocks, mhz), next(iter(clocks))) for mhz in common]
        else:
            one += [Run(SWEEP, number, {role: mhz}, role) for role, some in clocks.items() for mhz in some]
        dice.shuffle(one)
        runs += one
    return runs


def verification(chosen: Mapping[str, int], rounds: int) -> list[Run]:
    """The chosen clocks together, and default clocks again after each."""
    return [run for number in range(rounds) for run in (Run(VERIFY, number, chosen), Run(DEFAULT, rounds + number))]
