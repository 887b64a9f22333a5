"""The state machine of instances: the only place that adds, changes and removes them. Runs on the event loop.

An instance registers by a ping or by the configuration (PROBING), is admitted when a probe succeeds (READY), returns
to PROBING when a probe or a connection fails, is FROZEN while its engine is stalled, which no probe can see, and LOST
when its pings stop; it is removed some time later.

A ping that conflicts with a live instance does not replace it. The known instance is probed at once; if that finds it
gone, a later ping registers the new one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from disagg_proxy.address import Address, parse_address
from disagg_proxy.cluster.assignment import Assignment
from disagg_proxy.cluster.circuit_breaker import Breaker
from disagg_proxy.cluster.instance import Instance, Role, Source, State
from disagg_proxy.cluster.instance_index import InstanceIndex
from disagg_proxy.cluster.kv_compatibility import KvCompatibility
from disagg_proxy.cluster.kv_kind import KvKind, alike_but_for_model
from disagg_proxy.cluster.progress import ProgressTracker
from disagg_proxy.config.model import StaticInstance
from disagg_proxy.errors import EngineUnreachable

if TYPE_CHECKING:
    from disagg_proxy.cluster.lease import SharedLoad

MAX_INSTANCES = 1024
"""Bound on memory; further endpoints are not registered."""

_REMOVE_AFTER = 60.0
"""Seconds for which a lost instance stays visible in /stats."""

_REMOVE_HUNG_AFTER = 600.0
"""Seconds for which an instance that was found hung stays visible, so that a supervisor sees ``restart_wanted``."""

_HUNG_EXPIRIES = 3
"""Expiry times without a ping or a probe response after which a process counts as hung."""

Watcher = Callable[[Instance], None]
"""Called with the instance that has changed; must not block or raise."""


class Registry(InstanceIndex):
    """All instances and their states.

    Args:
        clock: monotonic seconds.
        expiry: seconds without a ping after which an instance that pings is LOST.

    Attributes:
        hung_after: seconds without a ping, a probe response or output after which a process that still accepts
            connections counts as hung.
        kv_compatibility: which prefill can send KV to which decode.
        has_liveness_connection: whether an idle connection to the instance is held (health/liveness.py). Its close
            then tells that the process has ended, and a refused connection alone does not.
        refresh_models: reads the models of all ready instances again, for a short time and not too often.
        shared_load: publishes this process's load; None without other workers.
        other_proxies: whether other proxies send requests to the same instances.
    """

    def __init__(self, clock: Callable[[], float], expiry: float) -> None:
        super().__init__()
        self._clock = clock
        self.set_expiry(expiry)
        self.kv_compatibility = KvCompatibility(MAX_INSTANCES)
        self._drained: set[str] = set()
        self._by_hand: dict[str, Assignment] = {}
        self.has_liveness_connection: Callable[[Instance], bool] = lambda instance: False
        self.refresh_models: Callable[[], Awaitable[None]] = _no_refresh
        self.shared_load: SharedLoad | None = None
        self.other_proxies = False
        self.has_kv_buffers = False
        self._on_change: list[Watcher] = []
        self._on_probe_wanted: list[Watcher] = []
        self._on_freed: list[Callable[[], None]] = []
        self._on_ended: list[Watcher] = []
        self._on_breaker: list[Watcher] = []
        self._on_assigned: list[Watcher] = []

    def set_expiry(self, seconds: float) -> None:
        """Take an instance for LOST after this time without a ping from now on."""
        self._expiry = seconds
        self.hung_after = _HUNG_EXPIRIES * seconds

    # -- observers

    def watch(
        self,
        changed: Watcher | None = None,
        probe_wanted: Watcher | None = None,
        freed: Callable[[], None] | None = None,
        ended: Watcher | None = None,
        breaker: Watcher | None = None,
        assigned: Watcher | None = None,
    ) -> None:
        """Register callbacks, which must not block or raise.

        Args:
            changed: after every change of a state, a reason or a drain.
            probe_wanted: an instance is to be probed now.
            freed: an instance may have capacity again.
            ended: the process of an instance has ended.
            breaker: the circuit breaker of an instance has opened or closed.
            assigned: an instance was assigned a role.
        """
        if assigned:
            self._on_assigned.append(assigned)
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

    def _request_probe(self, instance: Instance) -> None:
        for watcher in self._on_probe_wanted:
            watcher(instance)

    def _set_state(self, instance: Instance, state: State, reason: str) -> None:
        if instance.state is State.READY and state is not State.READY:
            instance.times_lost += 1
        if state is not instance.state:
            instance.restart_wanted = instance.suspect = False
        self.has_kv_buffers |= not instance.kind.computes
        instance.state, instance.reason, instance.changed_at = state, reason, self._clock()
        self._serving.clear()
        self.version += 1
        for watcher in self._on_change:
            watcher(instance)

    # -- registration

    def add_static(self, role: Role, named: StaticInstance, kind: KvKind) -> Instance:
        """Add an instance from the configuration, with ``kind`` until it announces another."""
        kv = None if named.kv_address is None else parse_address(named.kv_address)
        instance = Instance(role, parse_address(named.http_address), kv, Source.STATIC, kind)
        self._add(instance)
        return instance

    def announce(self, role: Role, http: Address, kv: Address, kind: KvKind, boot: str = "") -> str | None:
        """Process one ping. Returns why it was rejected, None if it was accepted."""
        known = self._instances.get(http.netloc)
        if known is not None and known.gone and (taken := self._kv_taken(kv, http)):
            return taken
        same = known is not None and (known.role, known.kv, known.kind) == (role, kv, kind)
        if known is not None and known.state is State.LOST and same:
            # It did not ping for a while, which does not prove that its process ended.
            known.last_ping = self._clock()
            if known.boot != boot:
                known.boot = boot
                self.process_ended(known)
            self._set_state(known, State.PROBING, "its pings have resumed")
            self._request_probe(known)
            return None
        if known is None or known.state is State.LOST:
            return self._register(role, http, kv, kind, boot)
        restarted = bool(known.boot) and boot not in ("", known.boot) and known.kv == kv
        restarted = restarted and alike_but_for_model(known.kind, kind)
        if known.role is not role or not (same or restarted or (known.kv is None and known.kind.needs_address)):
            return self._reject_conflict(known, role, kv, kind, boot)
        known.last_ping = self._clock()
        known.gone = False
        if known.boot != boot:
            if known.boot:
                known.kind = kind
                self.process_ended(known)
                self.suspend(known, "it was restarted")
                self._request_probe(known)
            known.boot = boot
        if known.kv is None:
            known.kv, known.kind = kv, kind
            self._request_probe(known)
        return None

    def note_links(self, http: Address, links: Iterable[tuple[str, str]]) -> None:
        """Keep what a ping of the instance at ``http`` says of its KV connections, for /stats."""
        if (instance := self._instances.get(http.netloc)) is not None:
            instance.kv_links = dict(links)

    def _register(self, role: Role, http: Address, kv: Address, kind: KvKind, boot: str) -> str | None:
        if taken := self._kv_taken(kv, http):
            return taken
        owner = self._kv_owner(kv, http)
        if owner is not None and owner.source is Source.PING and _removable(owner):
            self._remove(owner)
        if http.netloc not in self._instances and not self._make_capacity():
            return f"{MAX_INSTANCES} instances are registered already"
        self._add(Instance(role, http, kv, Source.PING, kind, boot, last_ping=self._clock()))
        return None

    def _kv_owner(self, kv: Address | None, http: Address) -> Instance | None:
        """The instance at another HTTP address that has this KV address: one whose process has not ended, else any."""
        owners = [
            i
            for i in self._instances.values()
            if kv is not None and i.kv == kv and i.http != http and i.state is not State.LOST
        ]
        return next((i for i in owners if not i.gone), owners[0] if owners else None)

    def _kv_taken(self, kv: Address, http: Address) -> str | None:
        """Why an instance at ``http`` cannot have this KV address, None if it can; probes an owner that may be gone."""
        owner = self._kv_owner(kv, http)
        if owner is None or owner.gone:
            return None
        self._request_probe(owner)
        return f"the KV address {kv.text} belongs to {owner}; it is probed again"

    def _make_capacity(self) -> bool:
        """Whether another instance can be added; removes a lost one if need be."""
        if len(self._instances) < MAX_INSTANCES:
            return True
        gone = next((i for i in self._instances.values() if i.state is State.LOST and _removable(i)), None)
        if gone is not None:
            self._remove(gone)
        return gone is not None

    def _remove(self, instance: Instance) -> None:
        del self._instances[instance.key]

    def _add(self, instance: Instance) -> None:
        instance.draining = instance.key in self._drained
        if instance.kind.both_roles:
            instance.assignment = self._by_hand.get(instance.key)
        instance.progress = ProgressTracker(self._clock())
        self._instances[instance.key] = instance
        self._set_state(instance, State.PROBING, instance.reason)
        self._request_probe(instance)

    def _reject_conflict(self, known: Instance, role: Role, kv: Address, kind: KvKind, boot: str) -> str | None:
        if known.state is State.PROBING and known.source is Source.PING:
            self._remove(known)
            return self._register(role, known.http, kv, kind, boot)
        self._request_probe(known)
        return f"{known} is ready with KV address {known.kv.text if known.kv else '?'}; it is probed again"

    # -- results of probes and legs

    def admit(self, instance: Instance, models: Mapping[str, Mapping[str, Any]]) -> None:
        """A probe of its /health and /v1/models has succeeded."""
        instance.probe_failures = 0
        instance.last_probe_response = self._clock()
        if instance.state in (State.LOST, State.FROZEN):
            return
        owner = self._kv_owner(instance.kv, instance.http) if instance.gone else None
        if owner is not None and not owner.gone:
            self.suspend(instance, f"its KV address belongs to another {owner.role.value} instance now")
            return
        instance.gone = False
        if instance.kv is None and instance.kind.needs_address:
            _set_models(instance, models)
            self.suspend(
                instance,
                "its KV address is unknown: configure it as URL,KV_ADDRESS (or URL,nixl), or let it ping this proxy",
            )
            return
        same = list(instance.models) == list(models)
        _set_models(instance, models)
        if instance.state is not State.READY or not same:
            self._set_state(instance, State.READY, f"serves {', '.join(models)}")

    def suspend(self, instance: Instance, reason: str, *, gone: bool = False) -> None:
        """Send it no requests until a probe succeeds again.

        Args:
            gone: it refuses connections. Unless a liveness connection is held, its process counts as ended.
        """
        if gone:
            instance.last_probe_response = None
        if gone and not self.has_liveness_connection(instance):
            if instance.state in (State.READY, State.FROZEN):
                self.process_ended(instance)
            # vLLM pings before its HTTP server answers, so a new instance may refuse connections too.
            instance.gone = instance.source is Source.STATIC or instance.restarts > 0
        if instance.state is State.READY or (instance.state is State.PROBING and instance.reason != reason):
            self._set_state(instance, State.PROBING, reason)

    def suspect(self, instance: Instance, suspect: bool) -> None:
        """It may be stalled: send it only what no other instance can serve; or not any more."""
        if instance.suspect is not suspect:
            instance.suspect = suspect
            self.version += 1
            if not suspect:
                self.freed()

    def freeze(self, instance: Instance, reason: str, *, first: bool = True) -> None:
        """Its engine is stalled: send it no requests until it makes progress again, or its process has ended.

        Args:
            first: False when another worker of this proxy has found and counted the stall.
        """
        if instance.state is State.READY:
            instance.freezes += first
            self._set_state(instance, State.FROZEN, reason)

    def request_restart(self, instance: Instance, reason: str) -> None:
        """It is frozen or hung, and only a restart can help. Every change of its state withdraws the request."""
        if instance.state is not State.READY:
            instance.restart_wanted = True
            self._set_state(instance, instance.state, reason)

    def unfreeze(self, instance: Instance, reason: str) -> None:
        """Its engine makes progress again; a probe may admit it."""
        if instance.state is State.FROZEN:
            self._set_state(instance, State.PROBING, reason)
            self._request_probe(instance)

    def process_ended(self, instance: Instance) -> None:
        """Its process has ended, and with it the KV it held and its connections to peers."""
        instance.epoch += 1
        instance.restarts += 1
        instance.breaker = Breaker()
        orphaned, instance.progress = instance.progress, ProgressTracker(self._clock())
        instance.senders_frozen = 0
        instance.last_probe_response = None
        instance.restart_wanted = False
        if self.other_proxies and instance.role is Role.DECODE:
            self.kv_compatibility.assume_sent((i for i in self._instances.values() if i.role is Role.PREFILL), instance)
        self.kv_compatibility.process_ended(instance)
        orphans, instance.kv_orphans = instance.kv_orphans, []
        for claim in orphans:
            claim.release()
        for watcher in self._on_ended:
            watcher(instance)
        self.unfreeze(instance, "its process has ended")
        _fail_prefills(instance, orphaned, "its process has ended")

    def recheck(self, instance: Instance) -> None:
        """A leg failed in a way that does not show whether the process still runs: probe it now."""
        if self.knows(instance):
            self._request_probe(instance)

    def connection_refused(self, instance: Instance, reason: str) -> None:
        """A leg's connection to it was refused: suspend it and probe it now."""
        self.suspend(instance, reason, gone=True)
        self.recheck(instance)

    def maybe_restarted(self, instance: Instance) -> None:
        """It is ready, but may be another process than before: KV that an earlier process held is not used."""
        instance.epoch += 1

    def expire(self) -> None:
        """Move instances whose pings stopped to LOST, and remove those that have been LOST for a while."""
        now = self._clock()
        for instance in list(self._instances.values()):
            if instance.source is Source.STATIC or instance.last_ping is None:
                continue
            since_ping = now - instance.last_ping
            if instance.state is State.LOST:
                after = self.hung_after + _REMOVE_HUNG_AFTER if instance.unresponsive else _REMOVE_AFTER
                if now - instance.changed_at >= after and _removable(instance):
                    self._remove(instance)
            elif since_ping >= self._expiry:
                self._set_state(instance, State.LOST, f"no ping for {since_ping:.0f} s")
                _fail_prefills(instance, instance.progress, instance.reason)

    # -- drained by an operator

    def drain(self, instance: Instance, draining: bool = True) -> None:
        """Drain or undrain it; remembered for the endpoint, also across restarts and removal of the instance."""
        (self._drained.add if draining else self._drained.discard)(instance.key)
        instance.draining = draining
        self.version += 1
        for watcher in self._on_change:
            watcher(instance)

    def drained(self, role: Role) -> Sequence[Instance]:
        """Drained instances of one role, in any state."""
        return [i for i in self._instances.values() if i.serves(role) and i.draining] if self._drained else ()

    # -- roles

    def assign(self, instance: Instance, assignment: Assignment) -> None:
        """Assign a role to an instance of both. An operator's is remembered for the endpoint, as a drain is."""
        if assignment.by_hand:
            self._by_hand[instance.key] = assignment
        else:
            self._by_hand.pop(instance.key, None)
        before, instance.assignment = instance.assigned_role, assignment
        instance.role_moves += before is not None and assignment.role not in (None, before)
        self.version += 1
        for watcher in self._on_assigned:
            watcher(instance)
        self.freed()

    # -- load

    def freed(self) -> None:
        """A lease or a claim on KV of an instance was given back."""
        for watcher in self._on_freed:
            watcher()

    def able(self, role: Role, *, busy: bool = False) -> Sequence[Instance]:
        """Instances of one role that can serve a request now: accepting, not ejected, and not busy unless ``busy``."""
        now = self._clock()
        able = [i for i in self.accepting(role) if i.breaker.permits(now)]
        return able if busy else [i for i in able if not i.breaker.busy(now)]

    def rejected(self, instance: Instance) -> None:
        """It has rejected a leg because it is busy: for a while it gets only what no other instance can serve."""
        instance.rejections_total += 1
        instance.breaker.record_busy(self._clock())

    def breaker_changed(self, instance: Instance) -> None:
        """Its circuit breaker has opened or closed."""
        for watcher in self._on_breaker:
            watcher(instance)

    def now(self) -> float:
        """The registry's clock."""
        return self._clock()


def _set_models(instance: Instance, models: Mapping[str, Mapping[str, Any]]) -> None:
    # An adapter has no length of its own (vLLM 0.9.2 - 0.33, ``entrypoints/openai/serving_models.py``: null).
    lengths = [entry.get("max_model_len") for entry in models.values()]
    instance.models = models
    instance.max_model_len = max((length for length in lengths if isinstance(length, int)), default=0)


def _fail_prefills(instance: Instance, progress: ProgressTracker, reason: str) -> None:
    """Fail the legs in flight on a prefill that will not answer them, where decode can compute without the KV.

    Each leg then releases its transfer on decode. A leg of P2pNcclConnector is never failed: its decode would hang.
    Requests that it serves alone continue until their connections end.
    """
    if instance.serves(Role.PREFILL) and instance.kind.computes:
        error = EngineUnreachable(f"The prefill instance is out of service: {reason}.", refused=False)
        progress.fail(error, prefills_only=True)


async def _no_refresh() -> None:
    """Stands for :attr:`Registry.refresh_models` until there is a prober."""


def _removable(instance: Instance) -> bool:
    return not instance.in_flight and not instance.draining
