"""A TCP connection between two engines: exact reads, bounded waits, one close. Socket options are only here."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import Any

from disagg_kv.protocol.frames import Kind, read_frame

_PART = 4 * 1024 * 1024
_ENDED: int = getattr(select, "POLLRDHUP", 0)
"""Besides what poll always reports (POLLHUP, POLLERR); Linux tells the end of the other side's half so."""


class Closed(ConnectionError):
    """The other side closed the connection, or it was closed here."""


class Channel:
    """``seconds`` bounds every single read and write of bytes in the middle of a message, not the pauses between."""

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self._sock = sock
        self.turn = threading.Lock()
        """Held by who writes, where several threads do, until its message and the KV that belongs to it are out."""
        sock.settimeout(seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @classmethod
    def connect(cls, address: tuple[str, int], seconds: float, connect_seconds: float) -> Channel:
        """OSError if nobody listens there or answers in time."""
        return cls(socket.create_connection(address, timeout=connect_seconds), seconds)

    def frame(self, patient: bool = True) -> tuple[Kind, dict[str, Any]]:
        """The next frame. ``patient``: waits without end for its first byte. WireError for anything else."""
        first = True

        def read(count: int) -> bytes:
            nonlocal first
            data = bytearray(count)
            self.read_into(memoryview(data), patient=first and patient)
            first = False
            return bytes(data)

        return read_frame(read)

    def read_into(self, view: memoryview, patient: bool = False) -> None:
        """Fills the view. Closed, TimeoutError or OSError if that does not succeed."""
        at = 0
        while at < len(view):
            try:
                count = self._sock.recv_into(view[at:])
            except TimeoutError:
                if patient and at == 0:
                    continue
                raise
            if count == 0:
                raise Closed("the other side closed the connection")
            at += count

    def write(self, data: bytes | memoryview) -> None:
        """Sends everything. OSError if that does not succeed."""
        view = memoryview(data)
        for at in range(0, len(view), _PART):
            self._sock.sendall(view[at : at + _PART])

    def write_between(self, data: bytes) -> bool:
        """Sends a message unless another thread is in the middle of one: then False, without waiting."""
        if not self.turn.acquire(blocking=False):
            return False
        try:
            self.write(data)
        finally:
            self.turn.release()
        return True

    def broken(self) -> bool:
        """Whether the other side has closed the connection, or this one. Never blocks, also while another thread reads.

        A ``recv`` with MSG_PEEK and MSG_DONTWAIT would not do: Python waits for a socket that has a timeout before it
        calls the system, for the whole timeout if nothing comes, and then raises TimeoutError.
        """
        number = self._sock.fileno()
        if number < 0:
            return True
        look = select.poll()
        look.register(number, _ENDED)
        return bool(look.poll(0))

    def close(self) -> None:
        """Ends reads and writes of other threads at once. May be called often."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
