"""Liveness of the prefill engine at the other end of a connection, judged by its answers to PING.

TCP does not show it: the kernel of a stopped process acknowledges data and keep-alive probes.
"""

from __future__ import annotations

PROBES = 10
"""Consecutive unanswered probes after which the peer counts as dead."""
STALLS = 2.0
"""The probes take this multiple of ``stall_timeout_s``, more than the longest pause of a busy interpreter that a
transfer tolerates."""


class Liveness:
    """Counter of unanswered probes of one connection.

    Probes are counted instead of seconds, so that a pause of this process, in which it neither sends nor reads,
    counts as one probe at most. Threads: the reader calls ``on_data``, the writer everything else.
    """

    def __init__(self, stall_seconds: float) -> None:
        self.interval = STALLS * stall_seconds / PROBES
        """Seconds between two probes."""
        self._received = self._seen = self._missed = 0

    def on_data(self) -> None:
        """Record that data of any kind has arrived from the peer."""
        self._received += 1

    def reset(self) -> None:
        """Start probing, at first or after a time without probes."""
        self._seen, self._missed = self._received, 0

    def check(self, receiving: bool = False) -> bool:
        """Called once per interval: whether the peer still counts as alive, so that the next PING is to be sent.

        Args:
            receiving: KV is being received. That has its own limits, and PONG is queued behind the KV.
        """
        if receiving or self._seen != self._received:
            self.reset()
        else:
            self._missed += 1
        return self._missed < PROBES
