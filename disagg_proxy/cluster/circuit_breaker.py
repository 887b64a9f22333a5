"""Circuit breaker: ejects an instance that keeps failing.

CLOSED: requests pass. After :data:`FAILURES_TO_OPEN` failures in a row OPEN: no requests for ``MIN_OPEN_SECONDS``,
doubled at each further opening. Then HALF_OPEN: one trial request passes and decides. Errors that the client caused do
not count as failures.

An instance that says it is busy is not ejected: for :data:`BUSY_SECONDS`, or until it serves a request, it gets only
what no other instance can serve.
"""

from __future__ import annotations

from enum import Enum

FAILURES_TO_OPEN = 5
MIN_OPEN_SECONDS, MAX_OPEN_SECONDS = 2.0, 60.0
BUSY_SECONDS = 2.0


class BreakerState(Enum):
    """The value is shown in /stats."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """The circuit breaker of one instance. All times are readings of one monotonic clock, in seconds."""

    __slots__ = ("_busy_until", "_failures", "_open_seconds", "_open_until", "_trial_in_flight")

    def __init__(self) -> None:
        self._failures = 0
        self._open_seconds = 0.0
        self._open_until = 0.0
        self._trial_in_flight = False
        self._busy_until = 0.0

    @property
    def healthy(self) -> bool:
        """Closed, neither failed nor busy since the last success. Then :meth:`record_success` changes nothing."""
        return not self._failures and not self._open_seconds and not self._busy_until

    def state(self, now: float) -> BreakerState:
        """The state at ``now``."""
        if not self._open_seconds:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._open_until else BreakerState.HALF_OPEN

    def permits(self, now: float) -> bool:
        """Whether a request may be sent. :meth:`record_sent` must follow when it is: it starts the trial."""
        return not self._open_seconds or (now >= self._open_until and not self._trial_in_flight)

    def busy(self, now: float) -> bool:
        """Whether it has just said that it is busy."""
        return now < self._busy_until

    def record_busy(self, now: float) -> None:
        """The instance rejected a request because it has too many."""
        self._busy_until = now + BUSY_SECONDS

    def record_sent(self, now: float) -> None:
        """A request is being sent; in the half-open state it is the trial."""
        if self._open_seconds and now >= self._open_until:
            self._trial_in_flight = True

    def record_success(self) -> bool:
        """The instance answered, or failed through no fault of its own. Returns whether that closes the breaker."""
        closes = self._open_seconds > 0
        self._failures = 0
        self._open_seconds = self._busy_until = 0.0
        self._trial_in_flight = False
        return closes

    def record_failure(self, now: float) -> bool:
        """The instance failed a request. Returns whether that opens the breaker.

        Ignored while the breaker is open: such a request was sent before it opened.
        """
        if self.state(now) is BreakerState.OPEN:
            return False
        self._failures += 1
        if self._trial_in_flight or self._failures >= FAILURES_TO_OPEN:
            self._open_seconds = min(max(MIN_OPEN_SECONDS, self._open_seconds * 2), MAX_OPEN_SECONDS)
            self._open_until = now + self._open_seconds
            self._trial_in_flight = False
            return True
        return False

    def trip(self, now: float) -> bool:
        """Open at once, without counting up to the threshold. Returns whether it was not open before."""
        self._failures = FAILURES_TO_OPEN - 1
        return self.record_failure(now)

    def release_trial(self) -> None:
        """The trial request ended without a verdict; the next request may be the trial."""
        self._trial_in_flight = False
