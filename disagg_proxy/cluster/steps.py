"""When an engine last changed, observed about once a second, and after which time without a change it is suspected.

A change is output, or another value of the engine's own counters, which /metrics shows as of the last complete step
(vLLM 0.9.2 - 0.33, ``v1/metrics/loggers.py``). So a step of 60 s looks like a stall of 60 s: the limit is a multiple of
the longest recent step.
"""

from __future__ import annotations

from collections import deque

INTERVAL = 1.0
"""Seconds between two observations of an engine that owes an answer."""

MIN_SUSPECT_SECONDS = 3.0
"""Shortest time without a change after which an engine is suspected."""

_FACTOR = 5.0
"""The limit, in multiples of the predicted step."""

_MIN_STEPS = 3
"""With fewer observed steps an engine is not suspected."""

_STEPS = 256
"""Observed steps that the prediction uses."""

_MAX_GAP = 2.0
"""Seconds that one observation counts at most. After a longer gap the proxy or its host was paused, not the engine."""


class StepClock:
    """The time without a change of one engine process while it owes an answer.

    Attributes:
        idle: seconds without a change, as far as they were observed; 0 while it owes nothing.
    """

    __slots__ = ("_last", "_owed", "_steps", "idle")

    def __init__(self) -> None:
        self.idle = 0.0
        self._owed = False
        self._last: float | None = None
        self._steps: deque[float] = deque(maxlen=_STEPS)

    def observe(self, now: float, owes: bool, changed: bool) -> None:
        """One observation.

        Args:
            now: clock reading in seconds.
            owes: whether a leg waits for the engine.
            changed: whether it changed since the observation before.
        """
        passed = min(now - self._last, _MAX_GAP) if self._owed and self._last is not None else 0.0
        self._last, self._owed = now, owes
        if changed:
            self._steps.append(max(0.0, self.idle + passed - INTERVAL))
            self.idle = 0.0
        elif owes:
            self.idle += passed
        else:
            self.idle = 0.0

    def due(self, now: float) -> bool:
        """Whether the next observation is due."""
        return self._last is None or now - self._last >= INTERVAL

    def limit(self, compute: float) -> float | None:
        """Seconds without a change after which the engine is suspected; None while too few steps are known.

        Args:
            compute: predicted seconds to compute the prompts that wait for it.
        """
        if len(self._steps) < _MIN_STEPS:
            return None
        # The longest but one: a stall that has ended is no step.
        step = sorted(self._steps)[-2]
        return max(MIN_SUSPECT_SECONDS, _FACTOR * max(step, compute))
