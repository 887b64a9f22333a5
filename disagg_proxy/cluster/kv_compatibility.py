"""Which prefill can send KV to which decode: same KV protocol and layout, no stale NCCL communicator. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.kv_kind import why_apart

STALE = (
    "every ready prefill instance has sent KV to a decode process that is gone and would freeze on the new one; "
    "restart the prefill instances"
)
"""vLLM 0.9.2 - 0.23 keeps the NCCL communicator of an address (``p2p_nccl_engine.py``, ``create_connect``)."""

SELF = "an instance is not paired with itself"
"""Why one with both roles does not send KV to itself."""


class KvCompatibility:
    """Tracks which processes of decodes each prefill has sent KV to, per KV address.

    Args:
        max_addresses: bound on the KV addresses that are tracked.

    Attributes:
        version: changes whenever a result of :meth:`compatible` or :meth:`connected` may change.
        on_first_send: called with a prefill and a decode when the prefill first sends KV to the decode's process.
    """

    def __init__(self, max_addresses: int) -> None:
        self._max_addresses = max_addresses
        self.version = 0
        self._processes: Counter[str] = Counter()
        """KV address -> number of its current process: how many ended before."""
        self.on_first_send: Callable[[Instance, Instance], None] = lambda prefill, decode: None

    def process_ended(self, instance: Instance) -> None:
        """The process of ``instance`` has ended, and with it its connections to peers."""
        self.version += 1
        instance.kv_peers.clear()
        kv = instance.kv
        if kv is not None and (kv.text in self._processes or len(self._processes) < self._max_addresses):
            self._processes[kv.text] += 1

    def record_send(self, prefill: Instance, decode: Instance) -> None:
        """Prefill gets a request whose KV it pushes to decode."""
        if decode.kv is None:
            return
        # Not by [], which calls a method of Counter where there is no entry.
        kv, process = decode.kv.text, self._processes.get(decode.kv.text, 0)
        if prefill.kv_peers.get(kv) != process:
            prefill.kv_peers[kv] = process
            self.version += 1
            self.on_first_send(prefill, decode)

    def record_peer_send(self, prefill: Instance, kv: str, *, gone: bool = False) -> None:
        """Another worker or proxy has sent ``prefill`` a request for the decode at that KV address.

        Args:
            gone: it was for a process of the decode that has ended since.
        """
        process = self._processes[kv] - gone
        prefill.kv_peers[kv] = min(process, prefill.kv_peers.get(kv, process))
        self.version += 1

    def assume_sent(self, prefills: Iterable[Instance], decode: Instance) -> None:
        """Assume that other proxies have sent each of ``prefills`` a request for ``decode``: they do not report it."""
        if decode.kv is not None and not decode.kind.computes:
            for prefill in prefills:
                if not prefill.kind.computes:
                    self.record_peer_send(prefill, decode.kv.text)

    def compatible(self, prefill: Instance, decode: Instance) -> bool:
        """Whether prefill can send KV to decode now."""
        return self.why_not(prefill, decode) is None

    def connected(self, prefill: Instance, decode: Instance) -> bool:
        """Whether the KV connection of this pair exists already: an earlier request or a warm-up has made it."""
        if decode.kind.computes:
            return True
        kv = decode.kv
        return kv is not None and prefill.kv_peers.get(kv.text) == self._processes[kv.text]

    def why_not(self, prefill: Instance, decode: Instance) -> str | None:
        """Why prefill cannot send KV to decode, for people; None when it can.

        After a decode's restart on the same address, a prefill that has sent KV to the process before stalls at its
        next send, until it is restarted too (P2pNcclConnector of vLLM 0.21, measured).
        """
        if prefill is decode:
            return SELF
        if prefill.kind is not decode.kind and (apart := why_apart(prefill.kind, decode.kind)) is not None:
            return apart
        if decode.kv is None or not prefill.kv_peers:
            return None
        current = self._processes[decode.kv.text]
        return None if prefill.kv_peers.get(decode.kv.text, current) == current else STALE
