"""Making another process look at the table, by a counter of the kernel for each process (eventfd). Never blocks."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Sequence


def new_pokes(count: int) -> list[int]:
    """The descriptors of so many processes."""
    return [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]


class Wakeups:
    """All processes' descriptors, as one of them uses them."""

    def __init__(self, files: Sequence[int], own: int) -> None:
        self._files = files
        self._own = own
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self, poked: Callable[[], None]) -> None:
        """Call ``poked`` on the running loop whenever somebody wants this process to look."""

        def readable() -> None:
            try:
                os.eventfd_read(self._files[self._own])
            except BlockingIOError:
                return
            poked()

        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._files[self._own], readable)

    def close(self) -> None:
        """Hear nothing more."""
        if self._loop is not None:
            self._loop.remove_reader(self._files[self._own])

    def poke(self, which: Iterable[int] | None = None) -> None:
        """Make these processes look, all others when left out."""
        for index in range(len(self._files)) if which is None else which:
            if index != self._own:
                # BlockingIOError: the counter is saturated, so a wake-up is already pending.
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(self._files[index], 1)
