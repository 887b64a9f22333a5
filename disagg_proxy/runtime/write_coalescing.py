"""What is written in one turn of the event loop: its first write leaves at once, the others together at its end.

Whoever is written to sleeps, mostly, and waking it costs more than the write. An engine that is given one request after
another, with the proxy's own work between them, has slept again before each; given several in a row, it wakes once. The
first one does not wait, so that nothing is later for it while there is little to do. A turn that has much to write lets
go of it in pieces.
"""

from __future__ import annotations

import asyncio
from typing import Any

_MOST = 64
"""Writes that are held at most: about a millisecond's work."""

_MOST_BYTES = 256 * 1024
"""Long prompts are more work than short ones."""


class WriteBatch:
    """That of one event loop."""

    __slots__ = ("_bytes", "_turning", "_what", "_who")

    def __init__(self) -> None:
        self._who: list[WriteCoalescer] = []
        self._what: list[bytes] = []
        self._bytes = 0
        self._turning = False

    def post(self, transport: WriteCoalescer, data: bytes) -> None:
        """Write ``data``, in this turn, behind what was posted for the same transport before."""
        if not self._turning:
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)
            transport.deliver(data)
            return
        if len(data) > _MOST_BYTES:
            # It would leave now anyhow, copied behind its head.
            self.flush()
            transport.deliver(data)
            return
        who = self._who
        if who and who[-1] is transport:
            self._what[-1] += data
        else:
            who.append(transport)
            self._what.append(data)
            transport.held += 1
        self._bytes += len(data)
        if self._bytes > _MOST_BYTES or len(who) >= _MOST:
            self.flush()

    def flush(self) -> None:
        """Let go of what is held."""
        who, what = self._who, self._what
        if who:
            self._who, self._what, self._bytes = [], [], 0
            for at in range(len(who)):
                who[at].held -= 1
                who[at].deliver(what[at])

    def _turn(self) -> None:
        self._turning = False
        self.flush()


class WriteCoalescer:
    """A transport whose writes go through an outbox; otherwise as asyncio's (``asyncio.Transport``).

    Attributes:
        held: writes that have not left yet; they never will once it is closed from elsewhere.
    """

    __slots__ = ("_transport", "_write", "_write_batch", "held")

    def __init__(self, transport: asyncio.Transport, write_batch: WriteBatch) -> None:
        self._transport = transport
        self._write = transport.write
        self._write_batch = write_batch
        self.held = 0

    def write(self, data: bytes) -> None:
        """In this turn of the event loop."""
        self._write_batch.post(self, data)

    def deliver(self, data: bytes) -> None:
        """Now, unless it is closing."""
        if not self._transport.is_closing():
            self._write(data)

    def close(self) -> None:
        """Behind what was written before."""
        if self.held:
            self._write_batch.flush()
        self._transport.close()

    def write_eof(self) -> None:
        """Behind what was written before."""
        if self.held:
            self._write_batch.flush()
        try:
            self._transport.write_eof()
        except OSError:
            # Only asyncio's own transports raise: what was just written has found the other side gone.
            self._transport.abort()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Behind what was written before."""
        if self.held:
            self._write_batch.flush()
        self._transport.set_protocol(protocol)

    def abort(self) -> None:
        """At once; what is held is lost."""
        self._transport.abort()

    def is_closing(self) -> bool:
        """Whether nothing more will be sent."""
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        """Receive nothing."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Receive again."""
        self._transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        """Bytes that have left the outbox and wait for the socket."""
        return self._transport.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What the transport knows of its socket."""
        return self._transport.get_extra_info(name, default)
