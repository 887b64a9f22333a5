"""Coalesces the writes of one event loop iteration: the first one leaves at once, the others together at its end.

The receiving process usually sleeps, and waking it costs more than the write itself. An engine that gets several
requests one by one, with the proxy's own work between them, falls asleep and is woken for each; written together, they
wake it once. The first write is not delayed, so that batching adds no latency at low load. A long iteration flushes in
between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

_MAX_WRITES = 64
"""Batched writes after which the batch is flushed: about a millisecond of work."""

_MAX_BYTES = 256 * 1024
"""Batched bytes after which the batch is flushed."""


class WriteBatch:
    """The batched writes of one event loop, for all its transports.

    Attributes:
        started: something was written in this iteration.
    """

    __slots__ = ("_bytes", "_call_soon", "_data", "_end", "_transports", "started")

    def __init__(self) -> None:
        self._transports: list[WriteCoalescer] = []
        self._data: list[bytes] = []
        self._bytes = 0
        self.started = False
        # Looked up once: an iteration often has one write only, and Python before 3.12 makes a system call for it.
        self._call_soon: Callable[[Callable[[], None]], object] | None = None
        self._end = self._end_iteration

    def start(self) -> None:
        """The first write of this iteration leaves; the others are to be added."""
        self.started = True
        call_soon = self._call_soon
        if call_soon is None:
            call_soon = self._call_soon = asyncio.get_running_loop().call_soon
        call_soon(self._end)

    def add(self, transport: WriteCoalescer, data: bytes) -> None:
        """Write ``data`` within this iteration, in the order of the writes of one transport."""
        if len(data) > _MAX_BYTES:
            # It would be flushed at once anyway, and would be copied before.
            self.flush()
            transport.write_now(data)
            return
        transports = self._transports
        if transports and transports[-1] is transport:
            self._data[-1] += data
        else:
            transports.append(transport)
            self._data.append(data)
            transport.batched += 1
        self._bytes += len(data)
        if self._bytes > _MAX_BYTES or len(transports) >= _MAX_WRITES:
            self.flush()

    def flush(self) -> None:
        """Write everything that is batched."""
        transports, data = self._transports, self._data
        if transports:
            self._transports, self._data, self._bytes = [], [], 0
            for i in range(len(transports)):
                transports[i].batched -= 1
                transports[i].write_now(data[i])

    def _end_iteration(self) -> None:
        self.started = False
        if self._transports:
            self.flush()


class WriteCoalescer:
    """An ``asyncio.Transport`` whose writes go through a :class:`WriteBatch`.

    Attributes:
        batched: writes that are still in the batch. They are lost if the transport closes by other means than
            :meth:`close`.
    """

    __slots__ = ("_is_closing", "_transport", "_write", "_write_batch", "batched")

    def __init__(self, transport: asyncio.Transport, write_batch: WriteBatch) -> None:
        self._transport = transport
        self._write = transport.write
        self._is_closing = transport.is_closing
        self._write_batch = write_batch
        self.batched = 0

    def write(self, data: bytes) -> None:
        """Write within this event loop iteration. Runs for every token: the first write takes one call less."""
        batch = self._write_batch
        if batch.started:
            batch.add(self, data)
            return
        batch.start()
        if not self._is_closing():
            self._write(data)

    def write_now(self, data: bytes) -> None:
        """Write past the batch, unless the transport is closing."""
        if not self._is_closing():
            self._write(data)

    def close(self) -> None:
        """Close after everything that was written."""
        if self.batched:
            self._write_batch.flush()
        self._transport.close()

    def write_eof(self) -> None:
        """Half-close after everything that was written."""
        if self.batched:
            self._write_batch.flush()
        try:
            self._transport.write_eof()
        except OSError:
            # Only asyncio's own transports raise: the write before has found that the peer has closed.
            self._transport.abort()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Change the protocol after everything that was written."""
        if self.batched:
            self._write_batch.flush()
        self._transport.set_protocol(protocol)

    def abort(self) -> None:
        """Close at once; batched and buffered data is lost."""
        self._transport.abort()

    def is_closing(self) -> bool:
        """Whether further writes have no effect."""
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        """See ``asyncio.ReadTransport``."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """See ``asyncio.ReadTransport``."""
        self._transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        """Bytes that the socket has not accepted, without those in the batch."""
        return self._transport.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See ``asyncio.BaseTransport``."""
        return self._transport.get_extra_info(name, default)
