"""One leg's place in an instance's load, from before it is sent until it has ended."""

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
        instance.breaker.begin(registry.now())

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
            self.instance.breaker.undecided()
        elif failed:
            self.instance.breaker.failure(self._registry.now())
        else:
            self.instance.breaker.success()

    @property
    def same_process(self) -> bool:
        """Whether the instance is ready and has been so, without a break, since the lease began.

        After a restart its KV store is empty, and a decode of an older id would stall it for ever.
        """
        return self.instance.state is State.READY and self.instance.epoch == self._epoch
