"""What one request takes of an instance: a place in its load for each leg, and room in decode's KV buffer."""

from __future__ import annotations

from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry


class Lease:
    """Counts one leg on ``instance`` until :meth:`end`."""

    def __init__(self, registry: Registry, instance: Instance) -> None:
        self.instance = instance
        self._registry = registry
        self._epoch = instance.epoch
        self._ended = False
        instance.in_flight += 1
        instance.requests_total += 1
        # Those of this process; a successor starts with its own.
        self._breaker = instance.breaker
        self._breaker.begin(registry.now())
        self.pulse = instance.pulse

    def end(self, *, failed: bool | None = None, certain: bool = True) -> None:
        """Give the place back; only the first call counts.

        Args:
            failed: True when the instance is to blame, False when it did its part, None when neither is known.
            certain: False for a failure that the request may have brought about; the breaker does not count it.
        """
        if self._ended:
            return
        self._ended = True
        self.instance.in_flight -= 1
        self.instance.failures_total += bool(failed)
        if failed is None or not certain:
            self._breaker.undecided()
        elif failed:
            self._breaker.failure(self._registry.now())
        else:
            self._breaker.success()

        self._registry.freed()

    @property
    def process_ended(self) -> bool:
        """Whether the process that the lease began with is gone, or may be, and with it the KV it held."""
        return self.instance.epoch != self._epoch

    @property
    def same_process(self) -> bool:
        """Whether the instance is ready now, as the process that the lease began with.

        After a restart its KV store is empty, and a decode of an older id would stall it for ever.
        """
        return self.instance.state is State.READY and not self.process_ended


class KvClaim:
    """KV of one prompt from prefill to decode: from before the one is asked until the other has loaded it."""

    def __init__(self, registry: Registry, prefill: Instance, decode: Instance, size: int) -> None:
        self._registry = registry
        self._prefill = prefill
        self._decode = decode
        self._size = size
        self._released = False
        prefill.kv_waiting += 1
        decode.kv_waiting += 1
        decode.kv_waiting_bytes += size

    def release(self) -> None:
        """It does not wait any more; only the first call counts."""
        if self._released:
            return
        self._released = True
        self._prefill.kv_waiting -= 1
        self._decode.kv_waiting -= 1
        self._decode.kv_waiting_bytes -= self._size
        self._registry.freed()
