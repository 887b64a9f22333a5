"""Which connections to a KV port are open: few without a completed handshake, and a limited number with one."""

from __future__ import annotations

import threading

from disagg_kv.protocol.handshake import Refused
from disagg_kv.transport.channel import Channel

MAX_UNPROVED = 32
"""Connections in their handshake. It takes milliseconds, so the oldest of more than these is not a peer's."""


class OpenConnections:
    """Thread-safe.

    Args:
        limit: connections that have completed their handshake.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._unproved: dict[Channel, None] = {}
        self._proved: set[Channel] = set()

    def add(self, channel: Channel) -> Channel | None:
        """Add a new connection. Returns the oldest one without a handshake if it must be closed for that."""
        with self._lock:
            oldest = next(iter(self._unproved)) if len(self._unproved) >= MAX_UNPROVED else None
            if oldest is not None:
                del self._unproved[oldest]
            self._unproved[channel] = None
            return oldest

    def prove(self, channel: Channel) -> None:
        """Record that the handshake is complete.

        Raises:
            Refused: there are too many connections.
        """
        with self._lock:
            if len(self._proved) >= self._limit:
                raise Refused("too many connections (max_connections)")
            self._unproved.pop(channel, None)
            self._proved.add(channel)

    def remove(self, channel: Channel) -> None:
        with self._lock:
            self._unproved.pop(channel, None)
            self._proved.discard(channel)

    def all(self) -> list[Channel]:
        with self._lock:
            return [*self._unproved, *self._proved]
