"""Load accounting: what a request occupies on an instance, from the sending of a leg until its end.

The counts of an :class:`Instance` change here only. They are those of all workers of this proxy, as last read; each
change that this process makes is also reported to :class:`SharedLoad`, where there are other workers.
"""

from __future__ import annotations

from typing import Protocol

from disagg_proxy.cluster.choice import Forecast, Pair, SingleEngine
from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.cluster.registry import Registry

IN_FLIGHT, DIRECT_REQUESTS, KV_WAITING, KV_WAITING_TOKENS, ANSWERING, KV_COMMITTED = range(6)
"""The shared counts, in the order of :attr:`Instance.peer_counts`."""


class SharedLoad(Protocol):
    """Publishes the load of this process to the other workers."""

    def add(self, instance: Instance, count: int, change: int) -> None:
        """This process has changed one count (:data:`IN_FLIGHT` and so on) of ``instance`` by ``change``."""


class Lease:
    """Counts one leg and its ``tokens`` on ``instance``, until :meth:`end`.

    Args:
        computing: prompt tokens that it computes first.
        answer: tokens of KV that the request is expected to take where this leg generates its answer, else None.
        output: expected tokens of that answer.

    Attributes:
        progress: the tracker of the process that the lease began with.
    """

    __slots__ = (
        "_answer", "_breaker", "_computing", "_decoding", "_ended", "_epoch", "_output", "_registry", "_tokens",
        "instance", "progress",
    )  # fmt: skip

    def __init__(
        self,
        registry: Registry,
        instance: Instance,
        tokens: int = 0,
        computing: int = 0,
        answer: int | None = None,
        output: int = 0,
    ) -> None:
        self.instance = instance
        self._registry = registry
        self._epoch = instance.epoch
        self._ended = self._decoding = False
        self._tokens = tokens
        self._computing = computing
        self._answer = answer
        self._output = output
        instance.in_flight += 1
        instance.tokens_in_flight += tokens
        instance.computing_tokens += computing
        shared = registry.shared_load
        if shared is not None:
            shared.add(instance, IN_FLIGHT, 1)
        if answer is not None:
            instance.answering += 1
            instance.kv_committed += answer
            instance.output_tokens += output
            if shared is not None:
                shared.add(instance, ANSWERING, 1)
                shared.add(instance, KV_COMMITTED, answer)
        instance.requests_total += 1
        # Those of the current process of the engine; a restarted one gets new ones.
        self._breaker = breaker = instance.breaker
        if not breaker.healthy:
            breaker.record_sent(registry.now())
        self.progress = instance.progress

    def computed(self) -> None:
        """The prompt is computed, and the answer is generated from now on. Further calls have no effect."""
        if self._ended or self._decoding:
            return
        self._decoding = True
        instance = self.instance
        instance.decoding += 1
        if self._computing:
            instance.computing_tokens -= self._computing
            self._computing = 0
            if instance.role is Role.PREFILL:
                # On a prefill the tokens in flight are those that it has to compute.
                instance.tokens_in_flight -= self._tokens
                self._tokens = 0
            self._registry.freed()

    def end(self, *, failed: bool | None = None, certain: bool = True) -> None:
        """Stop counting the leg; only the first call has an effect.

        Args:
            failed: True when the instance is at fault, False when it did its part, None when neither is known.
            certain: False for a failure that the request may have caused; the breaker does not count it.
        """
        if self._ended:
            return
        self._ended = True
        instance, registry = self.instance, self._registry
        instance.in_flight -= 1
        instance.tokens_in_flight -= self._tokens
        instance.computing_tokens -= self._computing
        instance.decoding -= self._decoding
        shared, answer = registry.shared_load, self._answer
        if shared is not None:
            shared.add(instance, IN_FLIGHT, -1)
        if answer is not None:
            instance.answering -= 1
            instance.kv_committed -= answer
            instance.output_tokens -= self._output
            if shared is not None:
                shared.add(instance, ANSWERING, -1)
                shared.add(instance, KV_COMMITTED, -answer)
        if failed or not self._breaker.healthy:
            self._update_breaker(failed, certain)
        registry.freed()

    def _update_breaker(self, failed: bool | None, certain: bool) -> None:
        breaker, registry = self._breaker, self._registry
        self.instance.failures_total += bool(failed)
        if failed is None or not certain:
            breaker.release_trial()
        elif breaker.record_failure(registry.now()) if failed else breaker.record_success():
            registry.breaker_changed(self.instance)

    @property
    def process_ended(self) -> bool:
        """Whether the process that the lease began with has ended, or may have, so that the KV it held is gone."""
        return self.instance.epoch != self._epoch

    @property
    def lost(self) -> bool:
        """Whether the process of the lease has ended, is frozen, has stopped to ping, or leaves probes unanswered.

        A P2pNcclConnector prefill that sends to it blocks in its sender, which has no timeout
        (vLLM 0.9.2 - 0.23, ``p2p_nccl_engine.py``, ``send_sync``).
        """
        state = self.instance.state
        return (
            self.process_ended
            or state is State.FROZEN
            or state is State.LOST
            or (state is State.PROBING and self.instance.unresponsive)
        )

    @property
    def still_ready(self) -> bool:
        """Whether the instance is ready, and its process is the one that the lease began with.

        After a restart its KV store is empty, and a decode with an older id would stall it permanently.
        """
        return self.instance.state is State.READY and not self.process_ended


class KvClaim:
    """Counts the KV of one prompt, from before prefill's leg is sent until decode has loaded it.

    Args:
        size: tokens, 0 where decode has no KV buffer.
    """

    __slots__ = ("_decode", "_orphaned", "_prefill", "_registry", "_size", "released")

    def __init__(self, registry: Registry, prefill: Instance, decode: Instance, size: int) -> None:
        self._registry = registry
        self._prefill = prefill
        self._decode = decode
        self._size = size
        self.released = self._orphaned = False
        self._count_prompt(1)
        self._count_tokens(size)

    def release(self) -> None:
        """The KV is no longer waiting; only the first call has an effect."""
        if self.released:
            return
        self.released = True
        if not self._orphaned:
            self._count_prompt(-1)
        self._count_tokens(-self._size)
        self._registry.freed()

    def orphan(self) -> None:
        """The KV stays on decode, where nothing will load it: its tokens count until the end of decode's process.

        No effect after :meth:`release`.
        """
        if self.released or self._orphaned or not self._size:
            return
        self._orphaned = True
        self._decode.kv_orphans.append(self)
        self._count_prompt(-1)
        self._registry.freed()

    def resize(self, size: int) -> None:
        """Correct the estimated size, in tokens."""
        freed = self._size - size
        if self.released or not freed:
            return
        self._size = size
        self._count_tokens(-freed)
        if freed > 0:
            self._registry.freed()

    def _count_prompt(self, change: int) -> None:
        self._prefill.kv_waiting += change
        self._decode.kv_waiting += change
        shared = self._registry.shared_load
        if shared is not None:
            shared.add(self._prefill, KV_WAITING, change)
            shared.add(self._decode, KV_WAITING, change)

    def _count_tokens(self, change: int) -> None:
        self._decode.kv_waiting_tokens += change
        if self._registry.shared_load is not None:
            self._registry.shared_load.add(self._decode, KV_WAITING_TOKENS, change)


class EngineUse:
    """Context manager: counts a request that goes to ``instance`` alone, such as /tokenize."""

    def __init__(self, registry: Registry, instance: Instance) -> None:
        self._registry = registry
        self._instance = instance

    def __enter__(self) -> None:
        self._count(1)

    def __exit__(self, *_: object) -> None:
        self._count(-1)
        self._registry.freed()

    def _count(self, change: int) -> None:
        self._instance.direct_requests += change
        if self._registry.shared_load is not None:
            self._registry.shared_load.add(self._instance, DIRECT_REQUESTS, change)


class Placement:
    """The leases of one attempt. Creating it takes them, :meth:`release` gives back those still held.

    Args:
        found: a pair, or one engine that computes the prompt itself.
        kv_tokens: upper bound of the tokens of the prompts' KV; counted only where decode has a KV buffer.
        kv, output: tokens of KV that the request is expected to take until its end, and of its answer.

    Attributes:
        prefill: the instance that computes the prompt for another; None when ``decode`` computes it itself.
        decode: the instance that generates the answer. Its role is prefill where a prefill serves the request alone.
        kv: the claim on decode's KV buffer, None without a prefill.
        forecast: what was predicted of the request; None where nothing is.
    """

    __slots__ = ("decode", "decode_lease", "forecast", "kv", "prefill", "prefill_lease")

    def __init__(
        self, registry: Registry, found: Pair | SingleEngine, kv_tokens: int = 0, kv: int = 0, output: int = 0
    ) -> None:
        self.prefill: Instance | None = None
        self.prefill_lease: Lease | None = None
        self.kv: KvClaim | None = None
        self.forecast: Forecast | None = found.forecast
        if isinstance(found, Pair):
            decode = found.decode
            self.prefill = found.prefill
            self.prefill_lease = Lease(registry, found.prefill, found.prefill_tokens, found.prefill_tokens)
            self.kv = KvClaim(registry, found.prefill, decode, 0 if decode.kind.computes else kv_tokens)
            self.decode_lease = Lease(registry, decode, found.decode_tokens, 0, kv, output)
        else:
            decode = found.engine
            self.decode_lease = Lease(registry, decode, found.tokens, found.computes, kv, output)
        self.decode = decode

    def computed(self) -> None:
        """The prompt is computed, and the answer is generated from now on. Further calls have no effect."""
        self.decode_lease.computed()

    def drop_prefill(self) -> None:
        """This attempt sends nothing to prefill: give back its lease and the claim on KV."""
        if self.prefill_lease is not None:
            self.prefill_lease.end()
        self.release_kv()
        self.prefill = self.prefill_lease = self.kv = self.forecast = None

    def release_kv(self) -> None:
        """Decode has loaded the KV, or will not get it. Further calls have no effect."""
        if self.kv is not None:
            self.kv.release()

    def orphan_kv(self) -> None:
        """Nothing will load the KV: it counts until the end of decode's process (:meth:`KvClaim.orphan`)."""
        if self.kv is not None and not self.decode_lease.process_ended:
            self.kv.orphan()
            self.kv = None

    def release(self) -> None:
        """Give back everything that is still held."""
        if self.prefill_lease is not None:
            self.prefill_lease.end()
        self.decode_lease.end()
        self.release_kv()
