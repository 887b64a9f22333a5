"""The law by which the governor chooses clocks within an SLO. Pure: the time and all that it knows are handed to it.

Decode: one step down after 3 s below 85 % of the SLO, straight to the top above 95 % of it or when anything queues.
Prefill: the lowest clock at which the queue and the computation fit the TTFT budget. No clock goes below its floor, the
optimum of a sweep, and none changes twice within 250 ms, but upwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DWELL = 0.25
"""Seconds between two changes; a change to the top does not wait."""
CALM, ALARM = 0.85, 0.95
"""Shares of the SLO: below the first one a clock may go down, above the second one it goes to the top."""
PATIENCE = 3.0
"""Seconds below :data:`CALM` before a step down."""
FRESH = 3.0
"""Seconds after which figures are no data."""
MISSES = 2
"""Windows in a row with the SLO missed at the top, after which governing ends."""
BUDGET = 0.9
"""Share of the TTFT budget that a predicted prefill may take: the rest is for what the prediction does not know."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the proxy has seen in one window.

    Attributes:
        at: monotonic seconds.
        ttft_s, gap_s: high percentiles of the window; None where no request gave any.
        queued: requests that wait for an instance.
        prompts: prefills in flight.
    """

    at: float
    ttft_s: float | None = None
    gap_s: float | None = None
    queued: int = 0
    prompts: int = 0


def steps(supported: Sequence[int], floor: int, count: int = 12) -> tuple[int, ...]:
    """The clocks of a governor: from the floor to the top, evenly spaced."""
    top = supported[-1]
    inside = [clock for clock in supported if floor <= clock <= top] or [top]
    if len(inside) <= count:
        return tuple(inside)
    wanted = [inside[0] + (top - inside[0]) * number / (count - 1) for number in range(count)]
    return tuple(sorted({min(inside, key=lambda clock: abs(clock - mhz)) for mhz in wanted}))


class DecodeLaw:
    """The clock of decode.

    Args:
        clocks: ascending; the first one is the floor.
        slo_s: longest gap between two tokens.
    """

    def __init__(self, clocks: Sequence[int], slo_s: float) -> None:
        self._clocks = clocks
        self._slo = slo_s
        self._at = len(clocks) - 1
        self._changed = float("-inf")
        self._calm_since: float | None = None

    @property
    def clock(self) -> int:
        """In MHz."""
        return self._clocks[self._at]

    @property
    def at_top(self) -> bool:
        """Whether it is the highest one."""
        return self._at == len(self._clocks) - 1

    def missed(self, sample: Sample) -> bool:
        """Whether the window did not keep the SLO."""
        return sample.gap_s is not None and sample.gap_s > self._slo

    def next(self, sample: Sample) -> int:
        """The clock from now on."""
        if sample.queued or (sample.gap_s is not None and sample.gap_s > ALARM * self._slo):
            self._calm_since = None
            if not self.at_top:
                self._go(len(self._clocks) - 1, sample.at)
        elif sample.gap_s is not None and sample.gap_s >= CALM * self._slo:
            self._calm_since = None
        elif self._calm_since is None:
            # An idle decode is calm too: the next request finds a low clock and raises it.
            self._calm_since = sample.at
        elif sample.at - self._calm_since >= PATIENCE and sample.at - self._changed >= DWELL and self._at:
            self._go(self._at - 1, sample.at)
            self._calm_since = sample.at
        return self.clock

    def _go(self, at: int, now: float) -> None:
        self._at, self._changed = at, now


class PrefillLaw:
    """The clock of prefill, which learns from each window how long a prompt takes at the highest clock.

    Args:
        clocks: ascending; the first one is the floor.
        slo_s: longest time to the first token.
    """

    LEARNING = 0.3
    """Weight of a new window."""

    def __init__(self, clocks: Sequence[int], slo_s: float) -> None:
        self._clocks = clocks
        self._slo = slo_s
        self._clock = clocks[-1]
        self._changed = float("-inf")
        self._top_seconds: float | None = None

    @property
    def clock(self) -> int:
        """In MHz."""
        return self._clock

    @property
    def at_top(self) -> bool:
        """Whether it is the highest one."""
        return self._clock == self._clocks[-1]

    def missed(self, sample: Sample) -> bool:
        """Whether the window did not keep the SLO."""
        return sample.ttft_s is not None and sample.ttft_s > self._slo

    def next(self, sample: Sample) -> int:
        """The clock from now on."""
        if sample.ttft_s is not None:
            # The time of a prefill is at most inversely proportional to the clock, so this is no underestimate.
            seen = sample.ttft_s * self._clock / self._clocks[-1]
            before = self._top_seconds
            learned = seen if before is None else before + self.LEARNING * (seen - before)
            self._top_seconds = max(seen, learned)
        if sample.queued or (sample.ttft_s is not None and sample.ttft_s > ALARM * self._slo):
            wanted = self._clocks[-1]
        else:
            wanted = self._lowest_that_fits(sample.prompts)
        if wanted > self._clock or (wanted < self._clock and sample.at - self._changed >= DWELL):
            self._clock, self._changed = wanted, sample.at
        return self._clock

    def _lowest_that_fits(self, prompts: int) -> int:
        """Those in flight have a part of the seen time behind them; one more waits for at most one of them."""
        if self._top_seconds is None:
            return self._clocks[-1]
        work = self._top_seconds * (1 + max(0, prompts - 1) / 2)
        fits = [clock for clock in self._clocks if work * self._clocks[-1] / clock <= BUDGET * self._slo]
        return fits[0] if fits else self._clocks[-1]


Law = DecodeLaw | PrefillLaw


@dataclass(frozen=True, slots=True)
class Decision:
    """What to set.

    Attributes:
        clocks: MHz by role; None for the default clock.
        why: why clocks are the default ones; empty while they are governed.
    """

    clocks: dict[str, int | None]
    why: str = ""


NO_DATA = "the proxy has given no figures"
SLO_MISSED = "the SLO was missed in two windows in a row at the highest clock"


class Governor:
    """Both roles, and when governing ends. After an SLO that was missed it begins anew once a window keeps it.

    Args:
        laws: by role.
    """

    def __init__(self, laws: dict[str, Law]) -> None:
        self._laws = laws
        self._missed = 0
        self._given_up = False

    def default(self, why: str) -> Decision:
        """Default clocks."""
        return Decision(dict.fromkeys(self._laws), why)

    def next(self, sample: Sample | None, now: float) -> Decision:
        """What to set, by the newest window; None where there never was one."""
        if sample is None or now - sample.at > FRESH:
            return self.default(NO_DATA)
        missed = any(law.missed(sample) for law in self._laws.values())
        clocks = {role: law.next(sample) for role, law in self._laws.items()}
        highest = all(law.at_top for law in self._laws.values() if law.missed(sample))
        self._missed = self._missed + 1 if missed and highest else 0
        if self._missed >= MISSES:
            self._given_up = True
        elif self._given_up and not missed and not sample.queued:
            self._given_up = False
        return self.default(SLO_MISSED) if self._given_up else Decision(dict(clocks))
