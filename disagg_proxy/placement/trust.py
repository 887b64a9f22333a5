"""Whether what is learnt predicts well enough to decide by it. Pure."""

from __future__ import annotations

from typing import Final

_WEIGHT: Final = 1 / 24
"""Weight of one prediction in the mean error."""

_ENOUGH: Final = 24
"""Predictions from which on the mean error counts."""

_DISTRUSTED: Final = 0.5
_TRUSTED: Final = 0.3
"""Mean error from which on predictions are not used, and up to which they are used again."""


class Trust:
    """The recent error of predictions.

    Attributes:
        error: mean of the difference between predicted and actual, relative to the larger of them; 0 to 1.
        given: whether predictions are used.
    """

    __slots__ = ("_count", "error", "given")

    def __init__(self) -> None:
        self.error = 0.0
        self.given = True
        self._count = 0

    def add(self, predicted: float, actual: float) -> bool:
        """Compare one prediction with what it was. Returns whether :attr:`given` has changed."""
        largest = max(predicted, actual)
        if largest <= 0.0:
            return False
        self._count += 1
        weight = max(_WEIGHT, 1 / self._count)
        self.error += weight * (abs(predicted - actual) / largest - self.error)
        if self._count < _ENOUGH or (self.error <= _DISTRUSTED if self.given else self.error > _TRUSTED):
            return False
        self.given = not self.given
        return True
