"""The one place that knows all instances. Lives on the event loop's thread; time comes from the injected clock.

Life of an instance: announced by a ping or named at start (PROBING), admitted when its HTTP side answered rightly
(READY), back to PROBING when a probe or a connection fails, FROZEN while its engine is stalled, which no probe can
see, LOST when its pings stop, forgotten some time later.
A ping that contradicts a live instance does not displace it: the instance is probed at once instead, and the
newcomer gets in when that finds it gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from disagg_proxy.address import Address, parse_address
from disagg_proxy.cluster.circuit_breaker import Breaker
from disagg_proxy.cluster.instance import Instance, Role, Source, State
from disagg_proxy.cluster.kv_compatibility import KvCompatibility
from disagg_proxy.cluster.kv_kind import KvKind, alike_but_for_model
from disagg_proxy.cluster.progress import ProgressTracker
from disagg_proxy.config.model import StaticInstance
from disagg_proxy.errors import EngineUnreachable

if TYPE_CHECKING:
    from disagg_proxy.cluster.shared_load import SharedLoad

MAX_INSTANCES = 1024
"""Bound on memory: more endpoints than this on one machine are no engines."""

_FORGET_AFTER = 60.0
"""Seconds for which a lost instance stays visible in /stats."""

_FORGET_HUNG_AFTER = 600.0
"""The same for one that may be hung, after the time that decides it: its restart has to be asked for."""

_HUNG_AFTER = 3
"""Expiry times without a ping or an answer after which a process is taken to be hung."""

Watcher = Callable[[Instance], None]
"""Told about one instance; must not block or raise."""


class Registry:
    """All instances by their HTTP endpoint.

    Args:
        clock: monotonic seconds.
        expiry: seconds without a ping after which a pinging instance is out.

    Attributes:
        hung_after: seconds without any sign of life, from a process that does not refuse connections, after which
            only a restart helps.
        shared: told what this process puts on instances, where there are others.
        others_send: whether other proxies send requests to the same instances.
    """

    def __init__(self, clock: Callable[[], float], expiry: float) -> None:
        self._clock = clock
        self._expiry = expiry
        self.hung_after = _HUNG_AFTER * expiry
        self._instances: dict[str, Instance] = {}
        self._serving: dict[tuple[Role, str | None], tuple[Instance, ...]] = {}
        self._by_role: dict[Role, tuple[Instance, ...]] = {}
        self.version = 0
        """Changes whenever another set of instances may serve."""
        self.kv_compatibility = KvCompatibility(MAX_INSTANCES)
        self._drained: set[str] = set()
        self.has_lifeline: Callable[[Instance], bool] = lambda instance: False
        self.shared: SharedLoad | None = None
        self.others_send = False
        self._on_change: list[Watcher] = []
        self._on_probe_wanted: list[Watcher] = []
        self._on_freed: list[Callable[[], None]] = []
        self._on_ended: list[Watcher] = []
        self._on_breaker: list[Watcher] = []

    # -- who wants to know

    def watch(
        self,
        changed: Watcher | None = None,
        probe_wanted: Watcher | None = None,
        freed: Callable[[], None] | None = None,
        ended: Watcher | None = None,
        breaker: Watcher | None = None,
    ) -> None:
        """Call ``changed`` after every change of a state, ``probe_wanted`` when an instance must be looked at now,
        ``freed`` when an instance has room again for a request, ``ended`` when a process is gone,
        ``breaker`` when its breaker has opened or closed."""
        if breaker:
            self._on_breaker.append(breaker)
        if ended:
            self._on_ended.append(ended)
        if freed:
            self._on_freed.append(freed)
        if changed:
            self._on_change.append(changed)
        if probe_wanted:
            self._on_probe_wanted.append(probe_wanted)

    def _want_probe(self, instance: Instance) -> None:
        for watcher in self._on_probe_wanted:
            watcher(instance)

    def _move(self, instance: Instance, state: State, reason: str) -> None:
        if instance.state is State.READY and state is not State.READY:
            instance.times_lost += 1
        if state is not instance.state:
            instance.restart_wanted = False
        instance.state, instance.reason, instance.changed_at = state, reason, self._clock()
        self._serving.clear()
        self.version += 1
        for watcher in self._on_change:
            watcher(instance)

    # -- how instances come

    def add_static(self, role: Role, named: StaticInstance, kind: KvKind) -> Instance:
        """Take in an instance from the configuration, as ``kind`` until it announces another."""
        kv = None if named.kv_address is None else parse_address(named.kv_address)
        instance = Instance(role, parse_address(named.http_address), kv, Source.STATIC, kind)
        self._take_in(instance)
        return instance

    def announce(self, role: Role, http: Address, kv: Address, kind: KvKind, boot: str = "") -> str | None:
        """Take in one ping; returns why it was not accepted, None if it was."""
        known = self._instances.get(http.netloc)
        same = known is not None and (known.role, known.kv, known.kind) == (role, kv, kind)
        if known is not None and known.state is State.LOST and same:
            # It was silent, which is no proof that its process ended.
            known.last_ping = self._clock()
            if known.boot != boot:
                known.boot = boot
                self.process_ended(known)
            self._move(known, State.PROBING, "its pings are back")
            self._want_probe(known)
            return None
        if known is None or known.state is State.LOST:
            return self._newcomer(role, http, kv, kind, boot)
        restarted = bool(known.boot) and boot not in ("", known.boot) and known.kv == kv
        restarted = restarted and alike_but_for_model(known.kind, kind)
        if known.role is not role or not (same or restarted or (known.kv is None and known.kind.needs_address)):
            return self._contradiction(known, role, kv, kind, boot)
        known.last_ping = self._clock()
        if known.boot != boot:
            if known.boot:
                known.kind = kind
                self.process_ended(known)
                self.suspend(known, "it was restarted")
                self._want_probe(known)
            known.boot = boot
        if known.kv is None:
            known.kv, known.kind = kv, kind
            self._want_probe(known)
        return None

    def _newcomer(self, role: Role, http: Address, kv: Address, kind: KvKind, boot: str) -> str | None:
        owner = next((i for i in self._instances.values() if i.kv == kv and i.state is not State.LOST), None)
        if owner is not None and owner.key != http.netloc:
            return f"the KV address {kv.text} belongs to {owner}"
        if http.netloc not in self._instances and not self._has_room():
            return f"{MAX_INSTANCES} instances are known already"
        self._take_in(Instance(role, http, kv, Source.PING, kind, boot, last_ping=self._clock()))
        return None

    def _has_room(self) -> bool:
        """Whether another one can be remembered, if need be in place of one that is lost."""
        if len(self._instances) < MAX_INSTANCES:
            return True
        gone = next((i for i in self._instances.values() if i.state is State.LOST and _forgettable(i)), None)
        if gone is not None:
            self._drop(gone)
        return gone is not None

    def _drop(self, instance: Instance) -> None:
        del self._instances[instance.key]
        self._by_role.clear()

    def _take_in(self, instance: Instance) -> None:
        instance.draining = instance.key in self._drained
        instance.progress = ProgressTracker(self._clock())
        self._instances[instance.key] = instance
        self._by_role.clear()
        self._move(instance, State.PROBING, instance.reason)
        self._want_probe(instance)

    def _contradiction(self, known: Instance, role: Role, kv: Address, kind: KvKind, boot: str) -> str | None:
        if known.state is State.PROBING and known.source is Source.PING:
            self._drop(known)
            return self._newcomer(role, known.http, kv, kind, boot)
        self._want_probe(known)
        return f"{known} is ready with KV address {known.kv.text if known.kv else '?'}; it is probed again"

    # -- what probes and legs find out

    def admit(self, instance: Instance, models: Mapping[str, Mapping[str, Any]]) -> None:
        """Its /health and /v1/models answered rightly."""
        instance.probe_failures = 0
        instance.last_answer = self._clock()
        if instance.state in (State.LOST, State.FROZEN):
            return
        if instance.kv is None and instance.kind.needs_address:
            instance.models = models
            self.suspend(
                instance,
                "its KV address is unknown: name it as URL,KV_ADDRESS (or URL,nixl), or let it ping this proxy",
            )
            return
        same = list(instance.models) == list(models)
        instance.models = models
        if instance.state is not State.READY or not same:
            self._move(instance, State.READY, f"serves {', '.join(models)}")

    def suspend(self, instance: Instance, reason: str, *, gone: bool = False) -> None:
        """It must not get requests until a probe admits it again.

        Args:
            gone: its connections are refused. Where a lifeline is held, that one tells whether the process has ended.
        """
        if gone:
            instance.last_answer = None
        if gone and instance.state in (State.READY, State.FROZEN) and not self.has_lifeline(instance):
            self.process_ended(instance)
        if instance.state is State.READY or (instance.state is State.PROBING and instance.reason != reason):
            self._move(instance, State.PROBING, reason)

    def freeze(self, instance: Instance, reason: str, *, first: bool = True) -> None:
        """Its engine is stalled: no requests until it moves again, or its process has ended.

        Args:
            first: False when another process of this proxy has found and counted it.
        """
        if instance.state is State.READY:
            instance.freezes += first
            self._move(instance, State.FROZEN, reason)

    def want_restart(self, instance: Instance, reason: str) -> None:
        """It is frozen or hung, and nothing else is left to try. Withdrawn by every change of its state."""
        if instance.state is not State.READY:
            instance.restart_wanted = True
            self._move(instance, instance.state, reason)

    def thaw(self, instance: Instance, reason: str) -> None:
        """Its engine moves again; a probe may admit it."""
        if instance.state is State.FROZEN:
            self._move(instance, State.PROBING, reason)
            self._want_probe(instance)

    def process_ended(self, instance: Instance) -> None:
        """Its process is gone, and with it the KV it held and the peers it knew."""
        instance.epoch += 1
        instance.restarts += 1
        instance.breaker = Breaker()
        orphaned, instance.progress = instance.progress, ProgressTracker(self._clock())
        instance.senders_frozen = 0
        instance.last_answer = None
        instance.restart_wanted = False
        if self.others_send and instance.role is Role.DECODE:
            self.kv_compatibility.suppose_sent(
                (i for i in self._instances.values() if i.role is Role.PREFILL), instance
            )
        self.kv_compatibility.process_ended(instance)
        for watcher in self._on_ended:
            watcher(instance)
        self.thaw(instance, "its process has ended")
        _end_prefills(instance, orphaned, "its process has ended")

    def look_again(self, instance: Instance) -> None:
        """A leg failed in a way that leaves open whether the instance lives."""
        if self.knows(instance):
            self._want_probe(instance)

    def lost_contact(self, instance: Instance, reason: str) -> None:
        """A leg's connection to it was refused: out at once, and looked at again now."""
        self.suspend(instance, reason, gone=True)
        self.look_again(instance)

    def doubt(self, instance: Instance) -> None:
        """It is ready, but may be another process than before: what waited for it there is not asked from it."""
        instance.epoch += 1

    def expire(self) -> None:
        """Move instances whose pings stopped to LOST, and forget those that have been lost for long."""
        now = self._clock()
        for instance in list(self._instances.values()):
            if instance.source is Source.STATIC or instance.last_ping is None:
                continue
            silent = now - instance.last_ping
            if instance.state is State.LOST:
                after = self.hung_after + _FORGET_HUNG_AFTER if instance.silent else _FORGET_AFTER
                if now - instance.changed_at >= after and _forgettable(instance):
                    self._drop(instance)
            elif silent >= self._expiry:
                self._move(instance, State.LOST, f"no ping for {silent:.0f} s")
                _end_prefills(instance, instance.progress, instance.reason)

    # -- who is out for maintenance

    def drain(self, instance: Instance, draining: bool = True) -> None:
        """Give it nothing new, or again; holds for whatever process comes to its endpoint."""
        (self._drained.add if draining else self._drained.discard)(instance.key)
        instance.draining = draining
        self.version += 1
        for watcher in self._on_change:
            watcher(instance)

    def drained(self, role: Role) -> Sequence[Instance]:
        """Those of one role that are out for maintenance, in any state."""
        return [i for i in self._instances.values() if i.role is role and i.draining] if self._drained else ()

    # -- what others ask

    def freed(self) -> None:
        """A place or some KV on an instance was given back."""
        for watcher in self._on_freed:
            watcher()

    def breaker_moved(self, instance: Instance) -> None:
        """Its breaker has opened or closed."""
        for watcher in self._on_breaker:
            watcher(instance)

    def knows(self, instance: Instance) -> bool:
        """Whether it is still the instance at its endpoint."""
        return self._instances.get(instance.key) is instance

    def now(self) -> float:
        """The registry's clock."""
        return self._clock()

    def instances(self) -> Sequence[Instance]:
        """All that are known, prefills first, in the order of their coming."""
        return sorted(self._instances.values(), key=lambda i: i.role is Role.DECODE)

    def in_flight(self, role: Role) -> int:
        """Requests on all instances of one role, in any state."""
        found = self._by_role.get(role)
        if found is None:
            found = self._by_role[role] = tuple(i for i in self._instances.values() if i.role is role)
        if len(found) == 1:
            return found[0].in_flight
        return sum([i.in_flight for i in found])

    def ready(self, role: Role) -> Sequence[Instance]:
        """Ready instances of one role."""
        return self._cached(role, None, lambda i: True)

    def serving(self, role: Role, model: str | None) -> Sequence[Instance]:
        """Ready instances of one role that serve ``model``; all ready ones for None."""
        if model is None:
            return self.ready(role)
        return self._cached(role, model, lambda i: model in i.models)

    def _cached(self, role: Role, model: str | None, wanted: Callable[[Instance], bool]) -> Sequence[Instance]:
        found = self._serving.get((role, model))
        if found is None:
            found = tuple(
                i for i in self._instances.values() if i.role is role and i.state is State.READY and wanted(i)
            )
            if found:
                # Names that nobody serves are not kept: clients choose them, and there is no end to them.
                self._serving[(role, model)] = found
        return found

    def models(self) -> dict[str, Mapping[str, Any]]:
        """Every model that some ready instance serves, with what its /v1/models showed.

        In the instances' own order: clients that name no model take the first.
        """
        found: dict[str, Mapping[str, Any]] = {}
        for instance in self.instances():
            if instance.state is State.READY:
                for name, card in instance.models.items():
                    found.setdefault(name, card)
        return found

    def has_model(self, name: str) -> bool:
        """Whether some instance serves it, ready or not."""
        return any(name in instance.models for instance in self._instances.values())

    def missing(self) -> list[str]:
        """What keeps every pair from serving, in words; empty when both roles have an instance that takes requests.

        Clients read this, so it names no address.
        """
        lacks = []
        for role in Role:
            if any(not i.draining for i in self.ready(role)):
                continue
            known = [i for i in self._instances.values() if i.role is role]
            why = "; ".join(
                "one is drained for maintenance" if i.draining else f"one is {i.state.value}: {i.reason}"
                for i in known[:3]
            )
            lacks.append(f"no {role.value} instance is ready ({why or 'none has registered'})")
        return lacks


def _end_prefills(instance: Instance, progress: ProgressTracker, reason: str) -> None:
    """End the legs in flight on a prefill that will not answer them, where decode computes what it gets no KV for.

    Each leg then releases its transfer on decode. A leg of P2pNcclConnector is never ended: its decode would hang.
    """
    if instance.role is Role.PREFILL and instance.kind.computes:
        progress.fail(EngineUnreachable(f"The prefill instance is out of service: {reason}.", refused=False))


def _forgettable(instance: Instance) -> bool:
    return not instance.in_flight and not instance.draining
