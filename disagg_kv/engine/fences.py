"""When the KV of a step may be read: layer by layer where vLLM reports layers, else after the complete step.

vLLM calls ``save_kv_layer`` after each attention layer unless the step replays one CUDA graph over all layers (long
prefills never do). The call only means that the work is enqueued on the GPU, so a CUDA event is recorded each time,
the *mark*, and a sender waits for the mark of the planes that it is about to read. On a CPU the work is complete when
the call comes, and marks are None.
"""

from __future__ import annotations

import threading
from typing import Any

from disagg_kv.transport.base import Stalled


class StepFence:
    """Progress of one step: set by the engine's thread, awaited by sender threads. Planes complete in order or all at
    once."""

    def __init__(self, planes: int) -> None:
        self._planes, self._reached = planes, 0
        self._marks: list[tuple[int, Any]] = []
        self._changed = threading.Condition()

    def layer(self, first: int, end: int, mark: Any) -> None:
        """Record that planes ``first`` to ``end - 1`` are written at the mark. Ignored out of order; ``finish`` counts
        then."""
        with self._changed:
            if first == self._reached:
                self._reach(end, mark)

    def finish(self, mark: Any) -> None:
        """Record that all planes are written at the mark."""
        with self._changed:
            if self._reached < self._planes:
                self._reach(self._planes, mark)

    @property
    def finished(self) -> bool:
        with self._changed:
            return self._reached >= self._planes

    def wait(self, end: int, seconds: float) -> Any:
        """Return the mark after which all planes before ``end`` are written.

        Raises:
            Stalled: the step does not get that far within ``seconds``.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._reached >= end, seconds):
                raise Stalled(f"the step did not reach plane {end} of {self._planes} within {seconds} s")
            return next(mark for reached, mark in self._marks if reached >= end)

    def _reach(self, end: int, mark: Any) -> None:
        self._reached = end
        self._marks.append((end, mark))
        self._changed.notify_all()
