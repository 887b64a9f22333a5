"""Work that may outlive its client: prefill legs that run to their end, KV releases, and requests that finish late."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from disagg_proxy.runtime.inline_coroutine import InlineCoroutine

log = logging.getLogger(__name__)


class Background:
    """Holds a reference to running work, reports its failures, and waits for it at shutdown.

    ``len()`` counts the work that no connected client waits for.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._requests: set[InlineCoroutine] = set()
        self._detached: set[InlineCoroutine] = set()
        self._all_ended: asyncio.Event | None = None

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run ``work`` in a task of its own, independent of the caller's cancellation."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def request(self, work: Coroutine[Any, Any, Any]) -> InlineCoroutine:
        """Run ``work`` on behalf of a connected client, without a task. The caller starts it."""
        coroutine = InlineCoroutine(work, self._coroutine_ended)
        self._requests.add(coroutine)
        return coroutine

    def leg(self, work: Coroutine[Any, Any, Any]) -> InlineCoroutine:
        """Run ``work``, which continues after its client has left, without a task. The caller starts it."""
        coroutine = InlineCoroutine(work, self._coroutine_ended)
        self._detached.add(coroutine)
        return coroutine

    def detach(self, coroutine: InlineCoroutine) -> None:
        """Count a request as background work from now on, because its client has left. No effect after its end."""
        if coroutine in self._requests:
            self._requests.discard(coroutine)
            self._detached.add(coroutine)

    def _coroutine_ended(self, coroutine: InlineCoroutine, error: BaseException | None) -> None:
        self._requests.discard(coroutine)
        self._detached.discard(coroutine)
        if error is not None and not isinstance(error, asyncio.CancelledError):
            log.error("request failed", exc_info=error)
        if self._all_ended is not None and not self._requests and not self._detached:
            self._all_ended.set()

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)

    def __len__(self) -> int:
        return len(self._tasks) + len(self._detached)

    async def ended(self) -> None:
        """Wait until all running work has ended, including the work that it starts."""
        while self._tasks or self._requests or self._detached:
            if self._requests or self._detached:
                self._all_ended = asyncio.Event()
                await self._all_ended.wait()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def cancel_all(self) -> None:
        """Cancel all running work."""
        running = len(self) + len(self._requests)
        if running:
            log.warning(
                "Cancelled %d background requests: the grace time of the shutdown is over (SHUTDOWN_GRACE)", running
            )
        for coroutine in [*self._requests, *self._detached]:
            coroutine.cancel()
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
