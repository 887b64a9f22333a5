"""What a user may write for a clock or a power limit, and the supported value that it becomes. Pure."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

_PINNED = "lock:"
_CLOCK = re.compile(r"([0-9]{2,5})\s*(?:mhz)?", re.ASCII | re.IGNORECASE)
_WATTS = re.compile(r"([0-9]{1,4}(?:\.[0-9]+)?)\s*(?:w)?", re.ASCII | re.IGNORECASE)


class BadValue(ValueError):
    """The text is no clock or power limit; the message says what is."""


@dataclass(frozen=True, slots=True)
class ClockSetting:
    """A clock as the user wants it.

    Attributes:
        mhz: the highest clock.
        pinned: also the lowest one, so that an idle GPU keeps it; else a cap.
    """

    mhz: int
    pinned: bool = False

    def __str__(self) -> str:
        return f"{_PINNED if self.pinned else ''}{self.mhz}"


def parse_clock(text: str) -> ClockSetting | None:
    """``1410`` is a cap, ``lock:1410`` pins; the unit MHz may follow. None for an empty text: not to be touched.

    Raises:
        BadValue: anything else.
    """
    text = text.strip()
    if not text:
        return None
    pinned = text.lower().startswith(_PINNED)
    match = _CLOCK.fullmatch(text[len(_PINNED) :].strip() if pinned else text)
    if match is None or int(match[1]) == 0:
        raise BadValue(f"{text!r} is no clock: write MHz, such as 1410, or lock:1410 to pin it")
    return ClockSetting(int(match[1]), pinned)


def parse_watts(text: str) -> float | None:
    """``450`` or ``450W``; None for an empty text.

    Raises:
        BadValue: anything else.
    """
    text = text.strip()
    if not text:
        return None
    match = _WATTS.fullmatch(text)
    if match is None or not float(match[1]):
        raise BadValue(f"{text!r} is no power limit: write watts, such as 450")
    return float(match[1])


def nearest(supported: Sequence[int], mhz: int) -> int:
    """The supported clock closest to ``mhz``, the lower one of two; ``supported`` is ascending and not empty."""
    at = bisect_left(supported, mhz)
    around = supported[max(0, at - 1) : at + 1]
    return min(around, key=lambda clock: (abs(clock - mhz), clock))


def evenly(supported: Sequence[int], count: int) -> list[int]:
    """``count`` of the supported clocks, evenly spaced from the lowest to the highest; all of them where they are few.

    ``supported`` is ascending.
    """
    if count < 2 or len(supported) <= count:
        return list(supported) if count >= 2 else list(supported[-1:])
    low, high = supported[0], supported[-1]
    wanted = [low + (high - low) * number / (count - 1) for number in range(count)]
    return sorted({nearest(supported, round(mhz)) for mhz in wanted})
