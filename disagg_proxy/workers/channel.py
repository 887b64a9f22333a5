"""How the processes of one proxy notify each other: messages (supervisor and worker), and wake-ups (all of them).

Sending never blocks, so a stopped process delays no other one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgpack

_MAX_BYTES = 65536

Message = Sequence[Any]
"""The first item is the kind of the message."""


class Channel:
    """One end of a socket pair (SOCK_SEQPACKET, which preserves message boundaries).

    Messages that the other side does not read yet are kept, only the newest under each name. A stopped worker therefore
    costs a bounded amount of memory, and gets the current state when it continues.

    Args:
        end: this side's socket; closed by :meth:`close`.
        on_message: called with each message.
        on_end: called once the other side has closed.
    """

    def __init__(
        self, end: socket.socket, on_message: Callable[[Message], None], on_end: Callable[[], None] = lambda: None
    ) -> None:
        self._end = end
        self._on_message = on_message
        self._on_end = on_end
        self._unsent: dict[object, bytes] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        end.setblocking(False)

    def open(self) -> None:
        """Start reading on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._end, self._readable)

    def close(self) -> None:
        """Stop reading and sending, and close the socket."""
        if self._loop is not None:
            self._loop.remove_reader(self._end)
            self._loop.remove_writer(self._end)
        self._closed = True
        self._end.close()

    def send(self, message: Message, name: object = None) -> None:
        """Send now, or once the other side reads; an unsent message of the same ``name`` is replaced."""
        if self._closed:
            return
        waiting = bool(self._unsent)
        name = (message[0],) if name is None else name
        # Removed first, so that the newest message is sent after those that were queued before it.
        self._unsent.pop(name, None)
        self._unsent[name] = msgpack.packb(message)
        if not waiting:
            self._flush()

    def _flush(self) -> None:
        while self._unsent:
            name, text = next(iter(self._unsent.items()))
            try:
                self._end.send(text)
            except (BlockingIOError, InterruptedError):
                if self._loop is not None:
                    self._loop.add_writer(self._end, self._writable)
                return
            except OSError:
                self._unsent.clear()
                return
            del self._unsent[name]

    def _writable(self) -> None:
        assert self._loop is not None
        self._loop.remove_writer(self._end)
        self._flush()

    def _readable(self) -> None:
        while not self._closed:
            try:
                text = self._end.recv(_MAX_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                text = b""
            if not text:
                if self._loop is not None:
                    self._loop.remove_reader(self._end)
                self._on_end()
                return
            self._on_message(msgpack.unpackb(text))


def new_wakeups(count: int) -> list[int]:
    """File descriptors (eventfd) of ``count`` processes."""
    return [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]


class Wakeups:
    """Makes other processes read the shared table, by one eventfd per process. Never blocks.

    Args:
        files: descriptors of all processes.
        own: index of this process.
    """

    def __init__(self, files: Sequence[int], own: int) -> None:
        self._files = files
        self._own = own
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self, on_wakeup: Callable[[], None]) -> None:
        """Call ``on_wakeup`` on the running loop whenever another process wakes this one."""

        def readable() -> None:
            try:
                os.eventfd_read(self._files[self._own])
            except BlockingIOError:
                return
            on_wakeup()

        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._files[self._own], readable)

    def close(self) -> None:
        """Stop reading. The descriptors stay open."""
        if self._loop is not None:
            self._loop.remove_reader(self._files[self._own])

    def wake(self, which: Iterable[int] | None = None) -> None:
        """Wake the processes with these indexes, all others by default."""
        for index in range(len(self._files)) if which is None else which:
            if index != self._own:
                # BlockingIOError: the counter is saturated, so a wake-up is already pending.
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(self._files[index], 1)
