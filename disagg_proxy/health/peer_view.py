"""What the other workers of this proxy report of an engine: the interface, and the implementation without workers.

Each worker sees the responses to its own requests only. So each reports what it finds out about an engine to all, and
recovery is coordinated: prefills are replayed one at a time over all workers, and an engine is given up when no worker
has a prefill left to replay.
"""

from __future__ import annotations

from typing import Protocol

from disagg_proxy.cluster.instance import Instance


class PeerView(Protocol):
    """The reports of all workers. "Report" means that the others can read it."""

    def outputs(self, instance: Instance) -> int:
        """Chunks of responses that other workers have received from it; reports this worker's count."""

    def frozen(self, instance: Instance) -> bool:
        """Whether a worker has reported a stall, and none has reported progress since."""

    def report_stall(self, instance: Instance) -> bool:
        """Report that the engine is stalled. Returns whether this worker is the first to do so."""

    def given_up(self, instance: Instance) -> bool:
        """Whether a worker has decided that only a restart can help."""

    def give_up(self, instance: Instance) -> None:
        """Report that only a restart can help."""

    def report_hung(self, instance: Instance, last_sign: float) -> bool:
        """Report that its process hangs. Returns whether no other worker has reported that since ``last_sign``.

        Args:
            last_sign: clock reading of its last ping, probe response or output, in seconds.
        """

    async def may_replay(self, instance: Instance, distance: float | None) -> bool:
        """Wait until the workers agree who replays next; whether it is this one.

        Args:
            distance: of this worker's likeliest leg (:meth:`ProgressTracker.distance`), in seconds; the smallest goes
                first. None when there is nothing to replay here.
        """

    def report_blocked_prefill(self, prefill: Instance, decode: Instance) -> int:
        """Report that ``prefill`` is stalled while it sends to ``decode``. Returns how many prefills are by now."""


class NoPeers:
    """There are no other workers."""

    def outputs(self, instance: Instance) -> int:
        return 0

    def frozen(self, instance: Instance) -> bool:
        return False

    def report_stall(self, instance: Instance) -> bool:
        return True

    def given_up(self, instance: Instance) -> bool:
        return False

    def give_up(self, instance: Instance) -> None:
        return

    def report_hung(self, instance: Instance, last_sign: float) -> bool:
        return True

    async def may_replay(self, instance: Instance, distance: float | None) -> bool:
        return distance is not None

    def report_blocked_prefill(self, prefill: Instance, decode: Instance) -> int:
        decode.senders_frozen += 1
        return decode.senders_frozen
