"""An event loop on a virtual clock: nothing waits, time jumps to the next timer. The same seed gives the same run."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class _Selector:
    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everybody waits and nothing is going to happen")
        if timeout > 0:
            self._loop.now += timeout
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """No sockets, no threads, no signals."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._selector = _Selector(self)

    def time(self) -> float:
        return self.now

    def run_alone(self, main: Coroutine[Any, Any, None]) -> None:
        """Run ``main`` as the current loop, and close the loop."""
        asyncio.set_event_loop(self)
        try:
            self.run_until_complete(main)
        finally:
            asyncio.set_event_loop(None)
            self.close()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """An error in a callback ends the run."""
        raise context.get("exception") or RuntimeError(context["message"])

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass
