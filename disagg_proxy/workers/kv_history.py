"""Which prefill has sent KV to which decode process, over all workers. cluster/kv_compatibility.py says why it matters.

A worker broadcasts the first time that it sends a prefill towards a decode, and the end of a process when it notices
one, both with the time: KV sent to an address before its process ended went to the process that is gone.
"""

from __future__ import annotations

from collections.abc import Callable

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.workers.channel import Message
from disagg_proxy.workers.shared_table import now

_SAME_END = 5_000_000_000
"""Nanoseconds within which two workers that notice an end mean the same one."""

_LIFELINE_TIMEOUT = 2.0
"""Seconds within which a worker with a lifeline to the process notices its end itself."""

_MAX_ENDED = 4096


class SharedKvHistory:
    """One worker's view of the history.

    Args:
        broadcast: sends a message to all other workers.
        call_later: calls a function after a delay in seconds.
    """

    def __init__(
        self,
        registry: Registry,
        broadcast: Callable[[Message], None],
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._registry = registry
        self._broadcast = broadcast
        self._call_later = call_later
        self._ended: dict[str, int] = {}
        self._sent: dict[str, dict[str, int]] = {}
        self._applying = False
        registry.kv_compatibility.on_first_send = self._on_first
        registry.watch(changed=self._on_change, ended=self._on_end)

    def _on_first(self, prefill: Instance, decode: Instance) -> None:
        assert decode.kv is not None
        self._broadcast(["sent", prefill.key, decode.kv.text, now()])

    def _on_end(self, instance: Instance) -> None:
        at = now()
        kv = "" if instance.kv is None else instance.kv.text
        self._record_end(instance.key, kv, at)
        if not self._applying:
            self._broadcast(["ended", instance.key, kv, at])

    def _record_end(self, key: str, kv: str, at: int) -> None:
        while len(self._ended) >= _MAX_ENDED:
            self._ended.pop(next(iter(self._ended)))
        self._ended[key] = at
        if kv:
            self._ended[kv] = at
        self._sent.pop(key, None)

    def on_message(self, message: Message) -> None:
        """Take in a ``sent`` or ``ended`` message of another worker."""
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
            # This worker notices the end itself, unless the successor already responds to its first probe.
            self._call_later(_LIFELINE_TIMEOUT, lambda: self._apply_end(key, kv, at))
        else:
            self._apply_end(key, kv, at)

    def _apply_end(self, key: str, kv: str, at: int) -> None:
        if abs(at - self._ended.get(key, -_SAME_END)) < _SAME_END:
            return
        instance = self._find(key)
        if instance is None:
            self._record_end(key, kv, at)
            return
        self._applying = True
        try:
            self._registry.process_ended(instance)
        finally:
            self._applying = False

    def _find(self, key: str) -> Instance | None:
        return next((i for i in self._registry.instances() if i.key == key), None)

    def _on_change(self, instance: Instance) -> None:
        if self._sent.get(instance.key):
            self._apply(instance)

    def _apply(self, prefill: Instance) -> None:
        for kv, at in self._sent.pop(prefill.key, {}).items():
            self._registry.kv_compatibility.record_peer_send(prefill, kv, gone=self._ended.get(kv, 0) > at)
