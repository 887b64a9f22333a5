"""Choice of the next request rate. Pure.

Without a list: from 1 request/s, doubled until the SLO is missed or the engines saturate (halved if the first rate
misses it already), then bisected until the limit is known to a quarter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

FIRST = 1.0
LOWEST = 0.125
HIGHEST = 4096.0
KNOWN_TO = 1.25


class Ended(Enum):
    """Why a sweep ended; the value is the text in the report."""

    LIST = "all rates of the list were tried"
    FOUND = "the limit was found"
    NOTHING_KEPT = "no rate was low enough"
    HIGHEST = "the highest rate was kept"
    TIME = "the time limit expired before the limit was found"
    INTERRUPTED = "it was interrupted"
    FAILED = "the load generator failed"


@dataclass(frozen=True, slots=True)
class Tried:
    """A rate, and whether it held: the SLO was kept and responses kept up with arrivals."""

    rate: float
    held: bool


def rounded(rate: float) -> float:
    """Round to two significant digits."""
    digits = 1 - math.floor(math.log10(rate))
    return round(rate, digits)


def next_rate(tried: Sequence[Tried], listed: Sequence[float] = ()) -> float | Ended:
    """Return the next rate, or why the sweep has ended."""
    if listed:
        return listed[len(tried)] if len(tried) < len(listed) else Ended.LIST
    if not tried:
        return FIRST
    broken = min((one.rate for one in tried if not one.held), default=None)
    held = max((one.rate for one in tried if one.held and (broken is None or one.rate < broken)), default=None)
    if broken is None:
        highest = max(one.rate for one in tried)
        return highest * 2 if highest * 2 <= HIGHEST else Ended.HIGHEST
    if held is None:
        return broken / 2 if broken / 2 >= LOWEST else Ended.NOTHING_KEPT
    between = rounded(math.sqrt(held * broken))
    if broken / held <= KNOWN_TO or not held < between < broken:
        return Ended.FOUND
    return between
