"""What one request takes of an instance: a place in its load for each leg, and room in decode's KV buffer.

The only place where the counts of an instance change (cluster/shared_load.py).
"""

from __future__ import annotations

from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.selection import Pair, SingleEngine
from disagg_proxy.cluster.shared_load import IN_FLIGHT, KV_WAITING, KV_WAITING_BYTES, VISITS


class Lease:
    """Counts one leg on ``instance``, and its ``tokens``, until :meth:`end`."""

    __slots__ = ("_breaker", "_ended", "_epoch", "_registry", "_tokens", "instance", "progress")

    def __init__(self, registry: Registry, instance: Instance, tokens: int = 0) -> None:
        self.instance = instance
        self._registry = registry
        self._epoch = instance.epoch
        self._ended = False
        self._tokens = tokens
        instance.in_flight += 1
        instance.tokens_in_flight += tokens
        if registry.shared is not None:
            registry.shared.add(instance, IN_FLIGHT, 1)
        instance.requests_total += 1
        # Those of this process; a successor starts with its own.
        self._breaker = breaker = instance.breaker
        if not breaker.quiet:
            breaker.begin(registry.now())
        self.progress = instance.progress

    def end(self, *, failed: bool | None = None, certain: bool = True) -> None:
        """Give the place back; only the first call counts.

        Args:
            failed: True when the instance is to blame, False when it did its part, None when neither is known.
            certain: False for a failure that the request may have brought about; the breaker does not count it.
        """
        if self._ended:
            return
        self._ended = True
        instance, registry = self.instance, self._registry
        instance.in_flight -= 1
        instance.tokens_in_flight -= self._tokens
        if registry.shared is not None:
            registry.shared.add(instance, IN_FLIGHT, -1)
        if failed or not self._breaker.quiet:
            self._judge(failed, certain)
        registry.freed()

    def _judge(self, failed: bool | None, certain: bool) -> None:
        breaker, registry = self._breaker, self._registry
        self.instance.failures_total += bool(failed)
        if failed is None or not certain:
            breaker.undecided()
        elif breaker.failure(registry.now()) if failed else breaker.success():
            registry.breaker_moved(self.instance)

    @property
    def process_ended(self) -> bool:
        """Whether the process that the lease began with is gone, or may be, and with it the KV it held."""
        return self.instance.epoch != self._epoch

    @property
    def lost(self) -> bool:
        """Whether the process of the lease is gone, frozen, without pings, or does not answer its probes.

        A P2pNcclConnector prefill that sends to it blocks in its sender, which has no timeout
        (vLLM 0.9.2 - 0.23, ``p2p_nccl_engine.py``, ``send_sync``).
        """
        state = self.instance.state
        return (
            self.process_ended
            or state is State.FROZEN
            or state is State.LOST
            or (state is State.PROBING and self.instance.silent)
        )

    @property
    def same_process(self) -> bool:
        """Whether the instance is ready now, as the process that the lease began with.

        After a restart its KV store is empty, and a decode of an older id would stall it for ever.
        """
        return self.instance.state is State.READY and not self.process_ended


class KvClaim:
    """KV of one prompt from prefill to decode: from before the one is asked until the other has loaded it."""

    __slots__ = ("_decode", "_prefill", "_registry", "_size", "released")

    def __init__(self, registry: Registry, prefill: Instance, decode: Instance, size: int) -> None:
        self._registry = registry
        self._prefill = prefill
        self._decode = decode
        self._size = size
        self.released = False
        self._count(1)

    def release(self) -> None:
        """It does not wait any more; only the first call counts."""
        if self.released:
            return
        self.released = True
        self._count(-1)
        self._registry.freed()

    def resize(self, size: int) -> None:
        """Its size is known by now."""
        less = self._size - size
        if self.released or not less:
            return
        self._size = size
        self._decode.kv_waiting_bytes -= less
        if self._registry.shared is not None:
            self._registry.shared.add(self._decode, KV_WAITING_BYTES, -less)
        if less > 0:
            self._registry.freed()

    def _count(self, one: int) -> None:
        self._prefill.kv_waiting += one
        self._decode.kv_waiting += one
        self._decode.kv_waiting_bytes += one * self._size
        shared = self._registry.shared
        if shared is not None:
            shared.add(self._prefill, KV_WAITING, one)
            shared.add(self._decode, KV_WAITING, one)
            shared.add(self._decode, KV_WAITING_BYTES, one * self._size)


class EngineUse:
    """A request on ``instance`` that concerns no pair, while the block runs."""

    def __init__(self, registry: Registry, instance: Instance) -> None:
        self._registry = registry
        self._instance = instance

    def __enter__(self) -> None:
        self._count(1)

    def __exit__(self, *_: object) -> None:
        self._count(-1)
        self._registry.freed()

    def _count(self, one: int) -> None:
        self._instance.visits += one
        if self._registry.shared is not None:
            self._registry.shared.add(self._instance, VISITS, one)


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
