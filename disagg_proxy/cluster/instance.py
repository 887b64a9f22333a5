"""One vLLM instance as the proxy knows it: its identity, whether it may serve, and its load."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from disagg_proxy.address import Address
from disagg_proxy.cluster.circuit_breaker import Breaker
from disagg_proxy.cluster.engine_load import EngineLoad
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.progress import ProgressTracker

if TYPE_CHECKING:
    from disagg_proxy.cluster.assignment import Assignment


class Role(Enum):
    """The phase that an instance computes; the value is used in /stats and in logs."""

    PREFILL = "prefill"
    DECODE = "decode"


class State(Enum):
    """The state of an instance; the value is shown in /stats.

    PROBING: known, but its HTTP server has not passed a probe (or no longer does), or its KV address is not known.
    READY: may get requests. FROZEN: pings and answers /health, but its forward pass is stalled. LOST: its pings
    stopped; kept for a while so that /stats can show it, longer when it may be hung (:attr:`Instance.unresponsive`).
    """

    PROBING = "probing"
    READY = "ready"
    FROZEN = "frozen"
    LOST = "lost"


NOT_PROBED = "not probed yet"
"""The reason of an instance that has just registered."""


class Source(Enum):
    """How an instance became known."""

    PING = "ping"
    STATIC = "static"


_KV_SHARE = 0.95
"""Share of a KV cache that is promised to requests. The rest is for answers that become longer than expected."""


class Releasable(Protocol):
    """A claim on an instance (cluster/lease.py)."""

    def release(self) -> None:
        """Stop counting it."""


@dataclass(slots=True, eq=False)
class Instance:
    """Identity, state and load of one instance.

    The registry changes its state; leases (cluster/lease.py) change its load, totals and breaker. Clock readings are
    those of :meth:`Registry.now`, in seconds.

    Identity:
        http: address of its OpenAI server.
        kv: address of its KV connector, None until a ping announces it.
        kind: its KV protocol and cache layout.
        boot: id of its process; empty where the connector announces none.
        models: served names in the engine's own order, the first is its default; each with its /v1/models entry.
        max_model_len: tokens of the longest prompt that one of its models accepts; 0 when unknown.
        version: its vLLM version as /version says it, empty where it does not; None until it was read. Read before it
            becomes ready, and only where ``kind.computes``.
        salt: hash of its endpoint, the same in every process; rendezvous hashing uses it.
        slot: its row in the memory that the workers of this proxy share; -1 without other workers.

    State:
        reason: why it is in this state, for people.
        changed_at: clock reading of the last change of its state or reason.
        draining: drained by an operator: it gets no new requests, in any state, until the operator undoes that.
        assignment: the role that it has at present, of an instance with both; None where none was assigned.
        last_ping: clock reading of the last ping, None if there was none.
        last_probe_response: clock reading of the last response to a probe from a process that has been ready; None
            before it was ready, and once its port refuses connections.
        probe_failures: failed probes in a row.
        gone: its port refuses connections and its process has ended; until it announces itself or a probe succeeds.
        epoch: how often its process ended, or may have ended; KV from an earlier epoch is gone.
        kv_peers: on prefill, by KV address of each decode that it has sent KV to: which process of that decode it was.
        kv_links: on decode, transport of each open KV connection, by KV address of the prefill, where it is announced.
        kv_control_refused: why its KV port refuses control messages of this proxy; empty where it does not.
        breaker: ejects it while it keeps failing.

    Stalls:
        progress: the responses that are awaited from its engine, and when the engine last made progress.
        suspect: ready, but may be stalled (health/suspicion.py): it gets only what no other instance can serve.
        restart_wanted: frozen or hung, and only a restart can help.
        senders_frozen: on decode, prefills that stalled while sending KV to its current process.

    Load, of all workers of this proxy together:
        in_flight: requests on it now; on decode until the last byte of the stream.
        tokens_in_flight: estimated tokens of these (this process only): on prefill those it has to compute, on decode
            the prompts.
        direct_requests: requests on it now that go to this engine alone, such as /tokenize.
        kv_waiting: on both roles, prompts that were sent to prefill and whose KV decode has not loaded.
        kv_waiting_tokens: on decode, the tokens of these, estimated until prefill has counted them, and of orphans.
        kv_orphans: on decode, the claims of KV that stays in its buffer until its process ends (this process only).
        answering: requests on it now whose answer it generates, or is going to: pairs with it as decode, and those that
            are alone on it.
        kv_committed: tokens of KV that these are expected to take until their end.
        output_tokens: tokens that their answers are expected to have (this process only).
        computing_tokens: prompt tokens that it has to compute and has not (this process only).
        decoding: of ``answering`` those whose prompt is computed (this process only).
        peer_counts: the share of other workers in ``in_flight``, ``direct_requests``, ``kv_waiting``,
            ``kv_waiting_tokens``, ``answering`` and ``kv_committed``, as last read.
        engine_load: the engine's own figures, None until its /metrics were read.

    Totals, named as in /stats:
        requests_total, failures_total: legs sent to it, and those that failed through its fault.
        rejections_total: legs that it rejected because it is busy.
        times_lost: how often it stopped being ready. restarts: how often its process was seen to have ended.
        role_moves: how often its assigned role changed between prefill and decode.
        freezes, replays: how often it stalled, and prefills that were replayed to free it.
        kv_releases, kv_releases_failed: on decode, KV releases of abandoned requests that succeeded, and that failed.
        kv_missing: prefills that finished without reporting where their KV is, so decode computed (NixlConnector).
        prefills_refused: prefills that it refused although decode accepted the request, so decode computed.
    """

    role: Role
    http: Address
    kv: Address | None
    source: Source
    kind: KvKind
    boot: str = ""
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_model_len: int = 0
    version: str | None = None
    salt: int = field(init=False)
    slot: int = -1

    state: State = State.PROBING
    reason: str = NOT_PROBED
    changed_at: float = 0.0
    draining: bool = False
    assignment: Assignment | None = None
    last_ping: float | None = None
    last_probe_response: float | None = None
    probe_failures: int = 0
    gone: bool = False
    epoch: int = 0
    kv_peers: dict[str, int] = field(default_factory=dict)
    kv_links: dict[str, str] = field(default_factory=dict)
    kv_control_refused: str = ""
    breaker: Breaker = field(default_factory=Breaker)

    progress: ProgressTracker = field(default_factory=lambda: ProgressTracker(0.0))
    suspect: bool = False
    restart_wanted: bool = False
    senders_frozen: int = 0

    in_flight: int = 0
    tokens_in_flight: int = 0
    direct_requests: int = 0
    kv_waiting: int = 0
    kv_waiting_tokens: int = 0
    kv_orphans: list[Releasable] = field(default_factory=list)
    answering: int = 0
    kv_committed: int = 0
    output_tokens: int = 0
    computing_tokens: int = 0
    decoding: int = 0
    peer_counts: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    engine_load: EngineLoad | None = None

    requests_total: int = 0
    failures_total: int = 0
    rejections_total: int = 0
    times_lost: int = 0
    restarts: int = 0
    role_moves: int = 0
    freezes: int = 0
    replays: int = 0
    kv_releases: int = 0
    kv_releases_failed: int = 0
    kv_missing: int = 0
    prefills_refused: int = 0

    def __post_init__(self) -> None:
        raw = self.key.encode()
        self.salt = zlib.crc32(raw) << 32 | zlib.crc32(raw[::-1])

    @property
    def key(self) -> str:
        """Identity: its HTTP endpoint in one spelling."""
        return self.http.netloc

    def serves(self, role: Role) -> bool:
        """Whether it may get legs of this role."""
        return self.role is role or self.kind.both_roles

    @property
    def roles(self) -> list[Role]:
        """The roles that it may get legs of."""
        return [role for role in Role if self.serves(role)]

    @property
    def assigned_role(self) -> Role | None:
        """The role that it is assigned; None where it may get legs of each role that it serves."""
        return self.assignment.role if self.assignment is not None and self.kind.both_roles else None

    @property
    def present_role(self) -> Role:
        """The assigned role, else the announced one."""
        return self.assigned_role or self.role

    def prefers(self, role: Role) -> bool:
        """Whether it gets legs of this role although other instances could take them."""
        return self.serves(role) and self.assigned_role in (None, role)

    @property
    def default_model(self) -> str | None:
        """The model that vLLM takes when a request names none."""
        return next(iter(self.models), None)

    def kv_fits(self, tokens: int) -> bool:
        """Whether its KV cache holds ``tokens`` besides what it has promised; True when its capacity is not known.

        A single request always fits: waiting would not make the cache larger.
        """
        load = self.engine_load
        if load is None or not load.kv_capacity_tokens or not self.kv_committed:
            return True
        return self.kv_committed + tokens <= _KV_SHARE * load.kv_capacity_tokens

    @property
    def idle(self) -> bool:
        """Whether no client's request would be lost if its process ended now.

        A prefill may answer while its last tensor is still being sent (vLLM 0.9.2 - 0.23, ``p2p_nccl_engine.py``:
        ``send_async`` takes an item from the queue before it sends it, and ``wait_for_sent`` waits for an empty
        queue), so it is idle only when decode has loaded the KV.
        """
        return not (self.in_flight or self.direct_requests or self.kv_waiting)

    @property
    def unresponsive(self) -> bool:
        """Whether it has been ready and now leaves probes unanswered, although its port accepts connections.

        A process that is stopped or hung looks like this: the kernel still accepts its connections.
        """
        return self.last_probe_response is not None and self.probe_failures > 0

    @property
    def explanation(self) -> str:
        """``reason``, preceded by the drain if an operator has ordered one."""
        return f"drained for maintenance; {self.reason}" if self.draining else self.reason

    def __str__(self) -> str:
        return f"{'+'.join(role.value for role in self.roles)} {self.http.text}"
