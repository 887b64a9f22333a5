"""What one attempt of a request occupies: a place on each of its instances, and room for its KV on decode."""

from __future__ import annotations

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.lease import KvClaim, Lease
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.selection import Pair, SingleEngine


class Placement:
    """The leases of one attempt. Creating it takes the places, :meth:`release` gives back what is left of them.

    Args:
        found: a pair, or a decode that computes the prompt without a prefill.
        kv_bytes: estimated KV of the prompts in bytes; counted only where decode has a buffer that it fills.

    Attributes:
        prefill, decode: the instances; ``prefill`` is None for a decode that computes alone.
        kv: the claim on decode's KV buffer, None without a prefill.
    """

    __slots__ = ("decode", "decode_lease", "kv", "prefill", "prefill_lease")

    def __init__(self, registry: Registry, found: Pair | SingleEngine, kv_bytes: int = 0) -> None:
        decode = found.decode
        self.prefill: Instance | None = None
        self.prefill_lease: Lease | None = None
        self.kv: KvClaim | None = None
        if isinstance(found, Pair):
            self.prefill = found.prefill
            self.prefill_lease = Lease(registry, found.prefill, found.prefill_tokens)
            self.kv = KvClaim(registry, found.prefill, decode, 0 if decode.kind.computes else kv_bytes)
        self.decode = decode
        self.decode_lease = Lease(registry, decode, found.decode_tokens)

    def drop_prefill(self) -> None:
        """This attempt sends nothing to prefill."""
        if self.prefill_lease is not None:
            self.prefill_lease.end()
        self.loaded()
        self.prefill = self.prefill_lease = self.kv = None

    def loaded(self) -> None:
        """Decode has the KV, or will not get it. Further calls have no effect."""
        if self.kv is not None:
            self.kv.release()

    def release(self) -> None:
        """Give back every place that is still held."""
        if self.prefill_lease is not None:
            self.prefill_lease.end()
        self.decode_lease.end()
        self.loaded()
