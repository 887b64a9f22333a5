"""One vLLM instance as the proxy knows it: what it is, whether it may serve, and how busy it is."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from disagg_proxy.address import Address
from disagg_proxy.cluster.circuit_breaker import Breaker
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.progress import ProgressTracker


class Role(Enum):
    """What an instance does; the value is the word used in /stats and in logs."""

    PREFILL = "prefill"
    DECODE = "decode"


class State(Enum):
    """Where an instance stands.

    PROBING: known, but its HTTP side has not (or no longer) answered rightly, or its KV address is not known.
    READY: may get requests. FROZEN: pings and answers /health, but its forward pass is stalled. LOST: its pings
    stopped; kept a while so that /stats can say so, longer when it may be hung (:attr:`Instance.silent`).
    """

    PROBING = "probing"
    READY = "ready"
    FROZEN = "frozen"
    LOST = "lost"


NOT_PROBED = "not probed yet"
"""The reason of one that has just come."""


class Source(Enum):
    """How an instance became known."""

    PING = "ping"
    STATIC = "static"


@dataclass(slots=True, eq=False)
class Instance:
    """State of one instance. Changed by the registry, and by leases: load, totals, breaker.

    Attributes:
        http: where its OpenAI server listens.
        kv: where its KV connector listens, None until a ping tells.
        kind: how it exchanges KV. boot: which process it is, empty when it does not tell.
        models: served names in the engine's own order, the first is its default; each with the object that its
            /v1/models showed.
        reason: why it is in this state, for people.
        last_ping: clock reading of the last ping, None if there was none.
        last_answer: clock reading of the last answer to a probe from a process that has been ready; None before that,
            and once its port refuses connections.
        probe_failures: failed probes in a row.
        epoch: how often its process ended, or may have; after a change the KV it held is gone.
        times_lost: how often it stopped being ready. restarts: how often its process was seen to have ended.
        in_flight: requests on it now; for decode until the last byte of the stream.
        tokens_in_flight: estimated tokens of these: on prefill those that it has to compute, on decode the prompts.
        spoken_to: on prefill, which process of each decode's KV address it has been sent towards.
        draining: taken out for maintenance: it gets nothing new, whatever its state, until an operator undoes that.
        visits: requests on it now that concern no pair, such as /tokenize.
        kv_waiting: prompts that were sent to prefill and that decode has not loaded, on both.
        kv_waiting_bytes: on decode, estimated KV of prompts that were sent to prefill and that it has not loaded.
        requests_total, failures_total: legs sent to it, and those that failed by its own fault.
        kv_missing: prefills that were done and did not say where their KV is, so that decode computed (NixlConnector).
        prefills_refused: prefills that it refused of requests that decode accepted, so that decode computed.
        breaker: leaves it alone while it keeps failing.
        pulse: who waits for its engine, and whether that moves.
        freezes, replays: how often it stalled, and prefills that were repeated to free it.
        drains, drains_failed: on decode, KV of abandoned requests that was freed, and that was not.
        restart_wanted: frozen or hung, and nothing but a restart is left to try.
        senders_frozen: on decode, prefills that stalled while they sent to this process of it.
        salt: a number of its endpoint's own, the same in every process; policies hash with it.
        slot: its place in what several processes of this proxy share; -1 where nothing is shared.
        elsewhere: what of ``in_flight``, ``visits``, ``kv_waiting`` and ``kv_waiting_bytes`` belongs to the other
            processes, as last looked at.
    """

    role: Role
    http: Address
    kv: Address | None
    source: Source
    kind: KvKind
    boot: str = ""
    state: State = State.PROBING
    reason: str = NOT_PROBED
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    last_ping: float | None = None
    last_answer: float | None = None
    changed_at: float = 0.0
    probe_failures: int = 0
    epoch: int = 0
    times_lost: int = 0
    restarts: int = 0
    spoken_to: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0
    tokens_in_flight: int = 0
    draining: bool = False
    visits: int = 0
    kv_waiting: int = 0
    kv_waiting_bytes: int = 0
    requests_total: int = 0
    failures_total: int = 0
    kv_missing: int = 0
    prefills_refused: int = 0
    breaker: Breaker = field(default_factory=Breaker)
    progress: ProgressTracker = field(default_factory=lambda: ProgressTracker(0.0))
    freezes: int = 0
    replays: int = 0
    drains: int = 0
    drains_failed: int = 0
    restart_wanted: bool = False
    senders_frozen: int = 0
    salt: int = field(init=False)
    slot: int = -1
    elsewhere: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        raw = self.key.encode()
        self.salt = zlib.crc32(raw) << 32 | zlib.crc32(raw[::-1])

    @property
    def key(self) -> str:
        """Identity: its HTTP endpoint in one spelling."""
        return self.http.netloc

    @property
    def default_model(self) -> str | None:
        """The model that vLLM takes when a request names none."""
        return next(iter(self.models), None)

    @property
    def idle(self) -> bool:
        """Whether nothing of the proxy's clients would be lost if its process ended now.

        A prefill may answer while its last tensor is still on the way (vLLM 0.9.2 - 0.23, ``p2p_nccl_engine.py``:
        ``send_async`` takes an item from the queue before it sends it, and ``wait_for_sent`` waits for an empty
        queue), so it is idle only when decode has loaded the KV.
        """
        return not (self.in_flight or self.visits or self.kv_waiting)

    @property
    def silent(self) -> bool:
        """Whether it has been ready and now leaves probes without an answer, while its port is not closed.

        A process that is stopped or hung is like this: the kernel still accepts its connections.
        """
        return self.last_answer is not None and self.probe_failures > 0

    @property
    def explanation(self) -> str:
        """``reason``, and what an operator has done."""
        return f"drained for maintenance; {self.reason}" if self.draining else self.reason

    def __str__(self) -> str:
        return f"{self.role.value} {self.http.text}"
