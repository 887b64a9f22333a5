"""What fits into the time: the phases, in order of worth, and the seconds that each gets. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DRAIN = 2.5
"""Seconds kept at the end of a phase or block for the answers that are still under way."""

RAMP = 2.5
"""Seconds at the beginning of a saturating block that are not counted: its clients begin one after the other, so that
they do not go on in step."""


@dataclass(frozen=True)
class Phase:
    """One kind of load with one length of prompt.

    Attributes:
        kind: ``low``, an open loop at ``rate`` requests/s, the arms in turn; or ``saturating``, blocks of one arm each
            with ``clients`` that ask again as soon as they are answered.
        share: of the time that is there, against the shares of the others.
        least: seconds below which it says nothing.
    """

    kind: Literal["low", "saturating"]
    tokens: int
    share: float
    least: float
    most: float
    rate: float = 1.0
    clients: int = 1

    @property
    def name(self) -> str:
        """For people and files."""
        return f"{self.kind} {self.tokens}"

    def pairs(self, seconds: float) -> int:
        """``low``: how many pairs of requests fit."""
        return max(1, int((seconds - DRAIN) * self.rate / 2))

    def blocks(self, seconds: float) -> int:
        """``saturating``: how many blocks, in groups of direct, proxy, proxy, direct."""
        return max(1, int(seconds / 60)) * 4


def seconds_for(phases: Sequence[Phase], left: float) -> float:
    """For the first of ``phases``, when ``left`` seconds are there for all of them; 0: skip it.

    Phases at the end give way when not all of them can have their least.
    """
    first = phases[0]
    fitting = list(phases)
    while len(fitting) > 1 and sum(one.least for one in fitting) > left:
        fitting.pop()
    if first.least > left:
        return 0.0
    share = left * first.share / sum(one.share for one in fitting)
    return min(first.most, max(first.least, min(share, left - sum(one.least for one in fitting[1:]))))
