"""Passes announcements from the listener's thread to the event loop: the newest of each instance, bounded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from disagg_proxy.discovery.announcement import Announcement

_MAX_PENDING = 2048
"""Instances whose announcements may be pending; those of further ones are dropped until their next ping."""


class Mailbox:
    """Calls ``take`` on the event loop with all pending announcements as one batch."""

    def __init__(self, take: Callable[[list[Announcement]], None]) -> None:
        self._take = take
        self._lock = threading.Lock()
        self._pending: dict[tuple[str, ...], Announcement] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Deliver to the running event loop."""
        self._loop = asyncio.get_running_loop()

    def put(self, announcements: list[Announcement]) -> None:
        """Queue announcements; called in the listener's thread."""
        with self._lock:
            idle = not self._pending
            for announcement in announcements:
                if len(self._pending) < _MAX_PENDING:
                    self._pending[announcement.key] = announcement
        if idle and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def __len__(self) -> int:
        return len(self._pending)

    def _deliver(self) -> None:
        with self._lock:
            announcements, self._pending = self._pending, {}
        self._take(list(announcements.values()))
