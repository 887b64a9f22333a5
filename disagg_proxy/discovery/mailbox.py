"""Announcements on their way from the listener's thread to the event loop: the newest of each instance, bounded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from disagg_proxy.discovery.announcement import Announcement

_MAX_WAITING = 2048


class Mailbox:
    """Hands over to ``take`` on the loop, everything that has come until then at once."""

    def __init__(self, take: Callable[[list[Announcement]], None]) -> None:
        self._take = take
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, str], Announcement] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """From now on the running loop takes what comes."""
        self._loop = asyncio.get_running_loop()

    def put(self, announcements: list[Announcement]) -> None:
        """Called in the listener's thread."""
        with self._lock:
            idle = not self._waiting
            for announcement in announcements:
                if len(self._waiting) < _MAX_WAITING:
                    self._waiting[(announcement.http.netloc, announcement.kv.text)] = announcement
        if idle and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_over)

    def __len__(self) -> int:
        return len(self._waiting)

    def _hand_over(self) -> None:
        with self._lock:
            announcements, self._waiting = self._waiting, {}
        self._take(list(announcements.values()))
