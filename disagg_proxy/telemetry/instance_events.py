"""Which changes of instances are events, and how they are told to people. The words are listed in docs/observe.md."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from disagg_proxy.cluster.circuit_breaker import BreakerState
from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.cluster.registry import MAX_INSTANCES, Registry
from disagg_proxy.telemetry.event_log import EventLog

log = logging.getLogger(__name__)

SEEN_BY_ALL = frozenset(
    {"admitted", "probing", "lost", "frozen", "restart_wanted", "freed", "restarted", "drained", "undrained",
     "pair_refused"}
)  # fmt: skip
"""Kinds that each worker of a proxy finds out by itself."""


@dataclass(slots=True)
class _Seen:
    """An instance as it was when it was last looked at."""

    state: State
    restart_wanted: bool
    draining: bool


class InstanceEvents:
    """Follows a registry from its creation on, and is told by who recovers and drains.

    Args:
        logs: whether this process writes the log lines; one of several does.

    Attributes:
        quiet: whether an admission is no news: a worker that takes the place of another meets instances that are known.
    """

    def __init__(self, registry: Registry, event_log: EventLog, logs: bool = True) -> None:
        self._registry = registry
        self._logs = logs
        self._event_log = event_log
        self._seen: dict[str, _Seen] = {}
        self._refused: dict[tuple[str, str], str] = {}
        self._unpaired: dict[str, str] = {}
        self.quiet = False
        registry.watch(changed=self._changed, ended=self._ended, breaker=self._breaker)

    def _changed(self, instance: Instance) -> None:
        now = _Seen(instance.state, instance.restart_wanted, instance.draining)
        before = self._seen.get(instance.key) or _Seen(State.PROBING, False, instance.draining)
        self._seen[instance.key] = now
        if len(self._seen) > 2 * MAX_INSTANCES:
            self._forget()
        if now.draining is not before.draining:
            said = "is out for maintenance" if now.draining else "is back from maintenance"
            self._tell("drained" if now.draining else "undrained", instance, said)
        if now.state is not before.state:
            self._moved(instance, before.state)
        if now.restart_wanted and not before.restart_wanted:
            self._tell("restart_wanted", instance, instance.reason)

    def _forget(self) -> None:
        known = {i.key for i in self._registry.instances()}
        self._seen = {key: seen for key, seen in self._seen.items() if key in known}
        self._refused = {keys: why for keys, why in self._refused.items() if known.issuperset(keys)}
        self._unpaired = {key: why for key, why in self._unpaired.items() if key in known}

    def _moved(self, instance: Instance, before: State) -> None:
        state, reason = instance.state, instance.reason
        if state is State.READY:
            if not self.quiet:
                self._tell("admitted", instance, reason)
            self._meet(instance)
        elif state is State.FROZEN:
            self._tell("frozen", instance, reason)
        elif state is State.LOST:
            self._tell("lost", instance, reason)
        elif before is State.FROZEN:
            self._tell("freed", instance, reason)
        elif before is State.READY:
            self._tell("probing", instance, reason)

    def _ended(self, instance: Instance) -> None:
        self._tell("restarted", instance, "its process has ended, or another one has taken its place")

    def _breaker(self, instance: Instance) -> None:
        closed = instance.breaker.state(self._registry.now()) is BreakerState.CLOSED
        if closed:
            self._tell("breaker_closed", instance, "answers again and gets requests as before")
        else:
            self._tell("breaker_opened", instance, "kept failing and is left alone for a while")

    def _meet(self, instance: Instance) -> None:
        """Tell of the other role's instances that it cannot work with, once for each reason."""
        is_prefill = instance.role is Role.PREFILL
        for other in self._registry.ready(Role.DECODE if is_prefill else Role.PREFILL):
            prefill, decode = (instance, other) if is_prefill else (other, instance)
            between = (prefill.key, decode.key)
            why = self._registry.kv_compatibility.why_not(prefill, decode)
            if why is None:
                self._refused.pop(between, None)
            elif self._refused.get(between) != why:
                self._refused[between] = why
                self._tell("pair_refused", prefill, f"gets no request together with {decode}: {why}")
        for prefill in [instance] if is_prefill else self._registry.ready(Role.PREFILL):
            self._warn_unpaired(prefill)

    def _warn_unpaired(self, prefill: Instance) -> None:
        """Log a prefill that no ready decode of its model can exchange KV with, once for each reason."""
        count, reasons = 0, set()
        for decode in self._registry.ready(Role.DECODE):
            if prefill.models.keys().isdisjoint(decode.models):
                continue
            reason = self._registry.kv_compatibility.why_not(prefill, decode)
            if reason is None:
                self._unpaired.pop(prefill.key, None)
                return
            count += 1
            reasons.add(reason)
        why = "; ".join(sorted(reasons))
        if why and self._unpaired.get(prefill.key) != why:
            self._unpaired[prefill.key] = why
            log.log(
                logging.WARNING if self._logs else logging.DEBUG,
                "%s cannot exchange KV with any of the %d ready decode instances: %s", prefill, count, why,
            )  # fmt: skip

    # -- told by others

    def replayed(self, instance: Instance) -> None:
        """A prefill is repeated to free a decode."""
        self._event_log.count(
            "replayed", instance.key,
            "the prefill of a request that it may be waiting for is sent once more",
            "the prefills of {} requests that it may be waiting for were sent once more",
        )  # fmt: skip

    def drain_ended(self, instance: Instance, failure: str) -> None:
        """KV of an abandoned request was freed, or was not."""
        if failure:
            self._tell("drain_failed", instance, f"KV of an abandoned request was not freed: {failure}")
            return
        self._event_log.count(
            "kv_drained", instance.key,
            "KV of an abandoned request was freed", "KV of {} abandoned requests was freed",
        )  # fmt: skip

    def _tell(self, kind: str, instance: Instance, text: str) -> None:
        self._event_log.tell(kind, instance.key, text)
