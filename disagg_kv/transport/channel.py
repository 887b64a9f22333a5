"""A TCP connection between two engines: exact reads, bounded waits, idempotent close, socket options."""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import threading
import time
from typing import Any

from disagg_kv.protocol.frames import Kind, WireError, read_frame

_MAX_SEND_BYTES = 4 * 1024 * 1024
_HANG_UP: int = getattr(select, "POLLRDHUP", 0)
"""Linux reports a half-close by the peer so; POLLHUP and POLLERR are always reported."""


class Closed(ConnectionError):
    """The connection was closed by the other side or here."""


class Channel:
    """One connection.

    Args:
        seconds: limit of every single read or write within a message; idle time between messages is not limited.
    """

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self._sock, self._seconds = sock, seconds
        self._deadline: float | None = None
        self.write_lock = threading.Lock()
        """Held while a message and its KV are written, where several threads write."""
        self._awaited = False
        self._acknowledged: queue.SimpleQueue[bool] = queue.SimpleQueue()
        sock.settimeout(seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @classmethod
    def connect(cls, address: tuple[str, int], seconds: float, connect_seconds: float) -> Channel:
        """Connect.

        Raises:
            OSError: the address does not accept, or not within ``connect_seconds``.
        """
        return cls(socket.create_connection(address, timeout=connect_seconds), seconds)

    def limit(self, seconds: float | None) -> None:
        """Let all reads together take at most ``seconds`` from now on; None: only each read is limited again."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._sock.settimeout(self._seconds)

    def next_frame(self, may_idle: bool = True) -> tuple[Kind, dict[str, Any]]:
        """Read the next frame.

        Args:
            may_idle: wait for the first byte without limit.

        Raises:
            WireError: not a frame.
            OSError: see ``read_into``.
        """
        first = True

        def read(count: int) -> bytes:
            nonlocal first
            data = bytearray(count)
            self.read_into(memoryview(data), may_idle=first and may_idle)
            first = False
            return bytes(data)

        return read_frame(read)

    def read_into(self, view: memoryview, may_idle: bool = False) -> None:
        """Fill the view.

        Raises:
            Closed, TimeoutError, OSError: it cannot be filled.
        """
        at = 0
        while at < len(view):
            if self._deadline is not None:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("timed out")
                self._sock.settimeout(min(left, self._seconds))
            try:
                count = self._sock.recv_into(view[at:])
            except TimeoutError:
                if may_idle and at == 0:
                    continue
                raise
            if count == 0:
                raise Closed("the other side closed the connection")
            at += count

    def write(self, data: bytes | memoryview) -> None:
        """Send everything.

        Raises:
            OSError: the connection is broken, or the peer does not read within the limit.
        """
        view = memoryview(data)
        for at in range(0, len(view), _MAX_SEND_BYTES):
            self._sock.sendall(view[at : at + _MAX_SEND_BYTES])

    def try_write(self, data: bytes) -> bool:
        """Send a message and return True, or return False at once if another thread is in the middle of one."""
        if not self.write_lock.acquire(blocking=False):
            return False
        try:
            self.write(data)
        finally:
            self.write_lock.release()
        return True

    def expect_acknowledgement(self) -> None:
        """Called by a sender before it writes what the peer has to acknowledge."""
        self._awaited = True

    def on_acknowledgement(self) -> None:
        """Wake the sender; called by the thread that reads.

        Raises:
            WireError: there is nothing to acknowledge.
        """
        if not self._awaited:
            raise WireError("nothing is to be acknowledged")
        self._awaited = False
        self._acknowledged.put(True)

    def wait_acknowledged(self, seconds: float) -> None:
        """Return when the peer has acknowledged.

        Raises:
            Closed: the connection ended.
            TimeoutError: not within ``seconds``.
        """
        try:
            acknowledged = self._acknowledged.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"not acknowledged within {seconds:.1f} s") from None
        if not acknowledged:
            raise Closed("the connection was closed")

    def broken(self) -> bool:
        """Whether either side has closed the connection. Never blocks, also while another thread reads.

        ``recv`` with MSG_PEEK and MSG_DONTWAIT does not work here: for a socket with a timeout Python polls before the
        system call, for the complete timeout if there is no data, and raises TimeoutError.
        """
        number = self._sock.fileno()
        if number < 0:
            return True
        poller = select.poll()
        poller.register(number, _HANG_UP)
        return bool(poller.poll(0))

    def close(self) -> None:
        """Abort reads and writes of all threads. Idempotent."""
        self._acknowledged.put(False)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
