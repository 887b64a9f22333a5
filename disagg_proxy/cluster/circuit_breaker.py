"""When an instance that keeps failing is left alone: a circuit breaker, pure but for the times it is given.

CLOSED: requests pass. After several failures in a row OPEN: none pass for a while, doubled at each further opening.
Then HALF_OPEN: one request passes and decides. A client's own mistake is no failure.
"""

from __future__ import annotations

from enum import Enum

FAILURES_TO_OPEN = 5
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
"""Seconds."""


class BreakerState(Enum):
    """The word is what /stats shows."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """The state for one instance. All times are readings of one monotonic clock, in seconds."""

    __slots__ = ("_failures", "_open_until", "_pause", "_trying")

    def __init__(self) -> None:
        self._failures = 0
        self._pause = 0.0
        self._open_until = 0.0
        self._trying = False

    @property
    def quiet(self) -> bool:
        """Whether it is closed, and nothing has failed since the last success: then no call but a failure's matters."""
        return not self._failures and not self._pause

    def state(self, now: float) -> BreakerState:
        """Where it stands."""
        if not self._pause:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._open_until else BreakerState.HALF_OPEN

    def permits(self, now: float) -> bool:
        """Whether a request may be sent; does not take the half-open place, :meth:`begin` does."""
        return not self._pause or (now >= self._open_until and not self._trying)

    def begin(self, now: float) -> None:
        """A request is being sent."""
        if self._pause and now >= self._open_until:
            self._trying = True

    def success(self) -> bool:
        """An answer came that the instance is not to blame for. Whether that closes it."""
        closes = self._pause > 0
        self._failures = 0
        self._pause = 0.0
        self._trying = False
        return closes

    def failure(self, now: float) -> bool:
        """The instance failed a request. Whether that opens it.

        While it is open, what fails had been sent before and says nothing new.
        """
        if self.state(now) is BreakerState.OPEN:
            return False
        self._failures += 1
        if self._trying or self._failures >= FAILURES_TO_OPEN:
            self._pause = min(max(FIRST_PAUSE, self._pause * 2), LONGEST_PAUSE)
            self._open_until = now + self._pause
            self._trying = False
            return True
        return False

    def trip(self, now: float) -> bool:
        """The instance did something that one failure is enough for. Whether that opens it."""
        self._failures = FAILURES_TO_OPEN - 1
        return self.failure(now)

    def undecided(self) -> None:
        """The request that was to decide ended without a verdict; the next one may try."""
        self._trying = False
