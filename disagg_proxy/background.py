"""Work that outlives the client it was begun for: prefills that run to their end, and drains."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from disagg_proxy.steps import Steps

log = logging.getLogger(__name__)


class Background:
    """Keeps work alive until it ends, and waits for it at shutdown."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._steps: set[Steps] = set()
        self._no_steps: asyncio.Event | None = None

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run ``work`` in a task, whatever happens to the caller."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def request(self, work: Coroutine[Any, Any, Any]) -> Steps:
        """A request, to be begun by the caller, that runs without a task."""
        steps = Steps(work, self._stepped)
        self._steps.add(steps)
        return steps

    def _stepped(self, steps: Steps, error: BaseException | None) -> None:
        self._steps.discard(steps)
        if error is not None and not isinstance(error, asyncio.CancelledError):
            log.error("request failed", exc_info=error)
        if self._no_steps is not None and not self._steps:
            self._no_steps.set()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)

    def __len__(self) -> int:
        return len(self._tasks) + len(self._steps)

    async def ended(self) -> None:
        """Wait for what runs, and for what that begins."""
        while len(self):
            if self._steps:
                self._no_steps = asyncio.Event()
                await self._no_steps.wait()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def give_up(self) -> None:
        """Cancel what still runs."""
        if len(self):
            log.warning("%d background requests did not end in time (SHUTDOWN_GRACE) and are given up", len(self))
        for steps in list(self._steps):
            steps.cancel()
        late = set(self._tasks)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
