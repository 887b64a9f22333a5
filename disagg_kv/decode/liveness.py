"""Whether the prefill engine at the other end of a connection still runs, judged by its answers to PING.

TCP cannot tell: the kernel of a stopped process acknowledges data and keep-alive probes. No sockets and no clock.
"""

from __future__ import annotations

PROBES = 10
"""Consecutive unanswered probes after which the peer counts as dead."""
STALLS = 2.0
"""Multiple of ``stall_timeout_s`` that they take: above the longest pause of a busy interpreter that still counts as
progress within a transfer."""


class Liveness:
    """Unanswered probes of one connection. Probes are counted, not seconds: a pause of this process itself, in which
    it could neither probe nor read, counts as one probe at most.

    Threads: the reader calls ``heard``, the writer everything else.
    """

    def __init__(self, stall_seconds: float) -> None:
        self.interval = STALLS * stall_seconds / PROBES
        """Seconds between two probes."""
        self._heard = self._seen = self._missed = 0

    def heard(self) -> None:
        """Anything at all has come from the peer."""
        self._heard += 1

    def begin(self) -> None:
        """Probing starts, or starts again after a time without it."""
        self._seen, self._missed = self._heard, 0

    def probe(self, receiving: bool = False) -> bool:
        """One interval is over: whether the peer is still considered alive, so that the next PING is due.

        Args:
            receiving: KV is being received, which has limits of its own; PONG comes behind it.
        """
        if receiving or self._seen != self._heard:
            self.begin()
        else:
            self._missed += 1
        return self._missed < PROBES
