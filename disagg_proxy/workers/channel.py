"""Messages between the supervisor and one worker, over a socket pair that keeps their bounds (SOCK_SEQPACKET).

Sending never waits: what the other side does not take stays here, the newest under each name, until it does. So a
worker that is stopped costs a bounded amount of memory and nobody's time, and misses nothing in the end.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

_MAX_BYTES = 65536

Message = Sequence[Any]
"""The first item says what it is."""


class Channel:
    """One end.

    Args:
        take: told every message.
        ended: told when the other side is gone.
    """

    def __init__(
        self, end: socket.socket, take: Callable[[Message], None], ended: Callable[[], None] = lambda: None
    ) -> None:
        self._end = end
        self._take = take
        self._ended = ended
        self._unsent: dict[object, bytes] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gone = False
        end.setblocking(False)

    def open(self) -> None:
        """Read on the running loop from now on."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._end, self._readable)

    def close(self) -> None:
        """Read and send nothing more."""
        if self._loop is not None:
            self._loop.remove_reader(self._end)
            self._loop.remove_writer(self._end)
        self._gone = True
        self._end.close()

    def send(self, message: Message, name: object = None) -> None:
        """Send it now or later; of those with the same name that wait only the newest is sent."""
        if self._gone:
            return
        waiting = bool(self._unsent)
        name = (message[0],) if name is None else name
        # The newest stands where it came, after what was said before it.
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
        while not self._gone:
            try:
                text = self._end.recv(_MAX_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                text = b""
            if not text:
                if self._loop is not None:
                    self._loop.remove_reader(self._end)
                self._ended()
                return
            self._take(msgpack.unpackb(text))
