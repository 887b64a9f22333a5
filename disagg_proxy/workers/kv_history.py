"""Which prefill has sent KV to which decode process, over all workers (the rule: cluster/kv_compatibility.py).

A worker says when it sends a prefill towards a decode for the first time, and when it finds that a process has ended,
both with the time: what was sent to an address before its process ended was sent to the process that is gone.
"""

from __future__ import annotations

from collections.abc import Callable

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.workers.channel import Message
from disagg_proxy.workers.shared_table import now

_SAME_END = 5_000_000_000
"""Nanoseconds within which two workers notice the same end of a process."""

_NOTICED_AFTER = 2.0
"""Seconds within which a worker that holds a lifeline has noticed it by itself."""

_MAX_ENDED = 4096


class SharedKvHistory:
    """One worker's view.

    Args:
        tell: passes a message on to all other workers.
        later: calls something after so many seconds.
    """

    def __init__(
        self, registry: Registry, tell: Callable[[Message], None], later: Callable[[float, Callable[[], None]], object]
    ) -> None:
        self._registry = registry
        self._tell = tell
        self._later = later
        self._ended: dict[str, int] = {}
        self._sent: dict[str, dict[str, int]] = {}
        self._told = False
        registry.kv_compatibility.on_first_send = self._on_first
        registry.watch(changed=self._on_change, ended=self._on_end)

    def _on_first(self, prefill: Instance, decode: Instance) -> None:
        assert decode.kv is not None
        self._tell(["sent", prefill.key, decode.kv.text, now()])

    def _on_end(self, instance: Instance) -> None:
        at = now()
        kv = "" if instance.kv is None else instance.kv.text
        self._end(instance.key, kv, at)
        if not self._told:
            self._tell(["ended", instance.key, kv, at])

    def _end(self, key: str, kv: str, at: int) -> None:
        while len(self._ended) >= _MAX_ENDED:
            self._ended.pop(next(iter(self._ended)))
        self._ended[key] = at
        if kv:
            self._ended[kv] = at
        self._sent.pop(key, None)

    def heard(self, message: Message) -> None:
        """What another worker has said."""
        if message[0] == "sent":
            _, prefill, kv, at = message
            if self._ended.get(prefill, 0) > at:
                return
            self._sent.setdefault(prefill, {})[kv] = at
            instance = self._find(prefill)
            if instance is not None:
                self._apply(instance)
            return
        _, key, kv, at = message
        instance = self._find(key)
        if instance is not None and self._registry.has_liveness_connection(instance):
            # It will be noticed here too, unless its successor answers the first question already.
            self._later(_NOTICED_AFTER, lambda: self._believe(key, kv, at))
        else:
            self._believe(key, kv, at)

    def _believe(self, key: str, kv: str, at: int) -> None:
        if abs(at - self._ended.get(key, -_SAME_END)) < _SAME_END:
            return
        instance = self._find(key)
        if instance is None:
            self._end(key, kv, at)
            return
        self._told = True
        try:
            self._registry.process_ended(instance)
        finally:
            self._told = False

    def _find(self, key: str) -> Instance | None:
        return next((i for i in self._registry.instances() if i.key == key), None)

    def _on_change(self, instance: Instance) -> None:
        if self._sent.get(instance.key):
            self._apply(instance)

    def _apply(self, prefill: Instance) -> None:
        for kv, at in self._sent.pop(prefill.key, {}).items():
            self._registry.kv_compatibility.record_peer_send(prefill, kv, gone=self._ended.get(kv, 0) > at)
