"""Which changes of instances become events, and the texts that operators read. docs/observe.md lists the kinds."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from disagg_proxy.cluster.circuit_breaker import BreakerState
from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.cluster.registry import MAX_INSTANCES, Registry
from disagg_proxy.telemetry.event_log import EventLog

log = logging.getLogger(__name__)

SEEN_BY_EVERY_WORKER = frozenset(
    {"admitted", "probing", "lost", "frozen", "restart_wanted", "freed", "restarted", "drained", "undrained",
     "pair_refused", "role"}
)  # fmt: skip
"""Kinds that every worker detects on its own, so that the page shows each of them once."""


@dataclass(slots=True)
class _Snapshot:
    """State of an instance at its previous change."""

    state: State
    restart_wanted: bool
    draining: bool


class InstanceEvents:
    """Turns changes in a registry into events; stall recovery and KV releases report theirs by a call.

    Args:
        logs: whether this process logs roles at INFO and pairs without a common KV format at WARNING; only one worker
            does, the others log them at DEBUG.

    Attributes:
        quiet: suppresses ``admitted`` and ``role``: a replacement worker registers instances that its predecessor has
            reported.
    """

    def __init__(self, registry: Registry, event_log: EventLog, logs: bool = True) -> None:
        self._registry = registry
        self._logs = logs
        self._event_log = event_log
        self._seen: dict[str, _Snapshot] = {}
        self._pair_refusals: dict[tuple[str, str], str] = {}
        self._unpaired_reasons: dict[str, str] = {}
        self.quiet = False
        registry.watch(
            changed=self._on_change, ended=self._on_end, breaker=self._on_breaker, assigned=self._on_assigned
        )

    def _on_change(self, instance: Instance) -> None:
        now = _Snapshot(instance.state, instance.restart_wanted, instance.draining)
        before = self._seen.get(instance.key) or _Snapshot(State.PROBING, False, instance.draining)
        self._seen[instance.key] = now
        if len(self._seen) > 2 * MAX_INSTANCES:
            self._prune()
        if now.draining is not before.draining:
            text = "drained for maintenance" if now.draining else "back in rotation after maintenance"
            self._add("drained" if now.draining else "undrained", instance, text)
        if now.state is not before.state:
            self._on_state(instance, before.state)
        if now.restart_wanted and not before.restart_wanted:
            self._add("restart_wanted", instance, instance.reason)

    def _on_assigned(self, instance: Instance) -> None:
        assignment = instance.assignment
        if assignment is None or self.quiet:
            return
        role = assignment.role.value if assignment.role is not None else "prefill and decode"
        text = f"{role} from now on: {assignment.reason}"
        self._add("role", instance, text)
        log.log(logging.INFO if self._logs else logging.DEBUG, "%s is %s", instance, text)

    def _prune(self) -> None:
        known = {i.key for i in self._registry.instances()}
        self._seen = {key: seen for key, seen in self._seen.items() if key in known}
        self._pair_refusals = {keys: why for keys, why in self._pair_refusals.items() if known.issuperset(keys)}
        self._unpaired_reasons = {key: why for key, why in self._unpaired_reasons.items() if key in known}

    def _on_state(self, instance: Instance, before: State) -> None:
        state, reason = instance.state, instance.reason
        if state is State.READY:
            if not self.quiet:
                self._add("admitted", instance, reason)
            self._report_pairs(instance)
        elif state is State.FROZEN:
            self._add("frozen", instance, reason)
        elif state is State.LOST:
            self._add("lost", instance, reason)
        elif before is State.FROZEN:
            self._add("freed", instance, reason)
        elif before is State.READY:
            self._add("probing", instance, reason)

    def _on_end(self, instance: Instance) -> None:
        self._add("restarted", instance, "its process ended or was replaced by another one")

    def _on_breaker(self, instance: Instance) -> None:
        closed = instance.breaker.state(self._registry.now()) is BreakerState.CLOSED
        if closed:
            self._add("breaker_closed", instance, "circuit breaker closed: it responds again")
        else:
            self._add("breaker_opened", instance, "circuit breaker open: ejected after repeated failures")

    def _report_pairs(self, instance: Instance) -> None:
        """Report the ready instances of the other role that cannot be paired with ``instance``, once per reason."""
        ready, prefills, decodes = self._registry.ready, instance.serves(Role.PREFILL), instance.serves(Role.DECODE)
        pairs = [(instance, decode) for decode in ready(Role.DECODE) if prefills]
        pairs += [(prefill, instance) for prefill in ready(Role.PREFILL) if decodes]
        for prefill, decode in pairs:
            if prefill is decode:
                continue
            pair = (prefill.key, decode.key)
            why = self._registry.kv_compatibility.why_not(prefill, decode)
            if why is None:
                self._pair_refusals.pop(pair, None)
            elif self._pair_refusals.get(pair) != why:
                self._pair_refusals[pair] = why
                self._add("pair_refused", prefill, f"cannot be paired with {decode}: {why}")
        for prefill in ready(Role.PREFILL) if decodes else [instance]:
            self._warn_unpaired(prefill)

    def _warn_unpaired(self, prefill: Instance) -> None:
        """Log a prefill that cannot exchange KV with any ready decode of its model, once per reason."""
        count, reasons = 0, set()
        for decode in self._registry.ready(Role.DECODE):
            if prefill is decode or prefill.models.keys().isdisjoint(decode.models):
                continue
            reason = self._registry.kv_compatibility.why_not(prefill, decode)
            if reason is None:
                self._unpaired_reasons.pop(prefill.key, None)
                return
            count += 1
            reasons.add(reason)
        why = "; ".join(sorted(reasons))
        if why and self._unpaired_reasons.get(prefill.key) != why:
            self._unpaired_reasons[prefill.key] = why
            log.log(
                logging.WARNING if self._logs else logging.DEBUG,
                "%s cannot exchange KV with any of the %d ready decode instances: %s", prefill, count, why,
            )  # fmt: skip

    # -- reported by other components

    def replayed(self, instance: Instance) -> None:
        """A prefill of ``instance``'s requests is replayed to recover it."""
        self._event_log.add_repeated(
            "replayed", instance.key,
            "replayed the prefill of a request whose KV it may be waiting for",
            "replayed the prefills of {} requests whose KV it may be waiting for",
        )  # fmt: skip

    def kv_release_ended(self, instance: Instance, failure: str) -> None:
        """A KV release on ``instance`` has ended; ``failure`` is the reason where it failed, else empty."""
        if failure:
            self._add("drain_failed", instance, f"could not release the KV of an abandoned request: {failure}")
            return
        self._event_log.add_repeated(
            "kv_drained", instance.key,
            "released the KV of an abandoned request", "released the KV of {} abandoned requests",
        )  # fmt: skip

    def _add(self, kind: str, instance: Instance, text: str) -> None:
        self._event_log.add_event(kind, instance.key, text)
