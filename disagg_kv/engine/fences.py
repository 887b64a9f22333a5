"""When the KV of a step may be read: layer by layer where vLLM says so, else after the whole step.

vLLM calls ``save_kv_layer`` behind each attention layer unless the step is the replay of one CUDA graph over all layers
(which long prefills never are). These calls only give the work to the GPU, so each leaves a mark (a CUDA event); a
sender waits for the mark of the planes that it is about to read. On a CPU the work is done when the call comes, and
marks are None.
"""

from __future__ import annotations

import threading
from typing import Any

from disagg_kv.transport.base import Stalled


class StepFence:
    """Set by the engine's thread, waited for by sender threads. Planes are reached in their order or all at once."""

    def __init__(self, planes: int) -> None:
        self._planes, self._reached = planes, 0
        self._marks: list[tuple[int, Any]] = []
        self._changed = threading.Condition()

    def layer(self, first: int, end: int, mark: Any) -> None:
        """The planes from ``first`` to before ``end`` are written behind the mark. Out of order it means nothing: then
        ``finish`` is what counts."""
        with self._changed:
            if first == self._reached:
                self._reach(end, mark)

    def finish(self, mark: Any) -> None:
        """All planes are written behind the mark."""
        with self._changed:
            if self._reached < self._planes:
                self._reach(self._planes, mark)

    @property
    def finished(self) -> bool:
        with self._changed:
            return self._reached >= self._planes

    def wait(self, end: int, seconds: float) -> Any:
        """The mark behind which all planes before ``end`` are written. Stalled if the step does not come that far."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._reached >= end, seconds):
                raise Stalled(f"the step has not come to plane {end} of {self._planes} in {seconds} s")
            return next(mark for reached, mark in self._marks if reached >= end)

    def _reach(self, end: int, mark: Any) -> None:
        self._reached = end
        self._marks.append((end, mark))
        self._changed.notify_all()
