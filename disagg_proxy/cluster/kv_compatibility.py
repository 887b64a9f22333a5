"""Which prefill can hand KV to which decode: same kind of KV, and no memory of a process that is gone. Pure."""

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


class KvCompatibility:
    """Counts the processes behind each KV address.

    Args:
        most: bound on addresses that are followed.

    Attributes:
        version: changes whenever an answer of :meth:`possible` or :meth:`warm` may change.
        on_first: told of a prefill and a decode when the one is sent towards that process for the first time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.version = 0
        self._processes: Counter[str] = Counter()
        self.on_first: Callable[[Instance, Instance], None] = lambda prefill, decode: None

    def process_ended(self, instance: Instance) -> None:
        """Its process is gone, and with it the peers it knew."""
        self.version += 1
        instance.spoken_to.clear()
        if instance.kv is not None and (instance.kv.text in self._processes or len(self._processes) < self._most):
            self._processes[instance.kv.text] += 1

    def sends_towards(self, prefill: Instance, decode: Instance) -> None:
        """Prefill gets a request whose KV it pushes to decode."""
        if decode.kv is None:
            return
        kv, process = decode.kv.text, self._processes[decode.kv.text]
        if prefill.spoken_to.get(kv) != process:
            prefill.spoken_to[kv] = process
            self.version += 1
            self.on_first(prefill, decode)

    def has_sent(self, prefill: Instance, kv: str, *, gone: bool = False) -> None:
        """Another proxy or process has sent prefill towards that KV address.

        Args:
            gone: towards a process that has ended since.
        """
        process = self._processes[kv] - gone
        prefill.spoken_to[kv] = min(process, prefill.spoken_to.get(kv, process))
        self.version += 1

    def suppose_sent(self, prefills: Iterable[Instance], decode: Instance) -> None:
        """What other proxies do is not known, so each of ``prefills`` may have been sent towards decode."""
        if decode.kv is not None and not decode.kind.computes:
            for prefill in prefills:
                if not prefill.kind.computes:
                    self.has_sent(prefill, decode.kv.text)

    def possible(self, prefill: Instance, decode: Instance) -> bool:
        """Whether the two can work together now."""
        return self.why_not(prefill, decode) is None

    def warm(self, prefill: Instance, decode: Instance) -> bool:
        """Whether a request of this pair finds its connection made: by a request before, or by an introduction."""
        if decode.kind.computes:
            return True
        kv = decode.kv
        return kv is not None and prefill.spoken_to.get(kv.text) == self._processes[kv.text]

    def why_not(self, prefill: Instance, decode: Instance) -> str | None:
        """What keeps them apart, None when nothing does.

        After a decode's restart on the same address a prefill that has sent towards the process before freezes at
        its next send, until it is restarted too (P2pNcclConnector of vLLM 0.21, measured).
        """
        if prefill.kind is not decode.kind and (apart := why_apart(prefill.kind, decode.kind)) is not None:
            return apart
        if decode.kv is None or not prefill.spoken_to:
            return None
        now = self._processes[decode.kv.text]
        return None if prefill.spoken_to.get(decode.kv.text, now) == now else STALE
