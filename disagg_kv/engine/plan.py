"""What the scheduler side sends to the worker side for one step: plain data, pickled by vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from disagg_kv.protocol.keys import Key


@dataclass
class StartLoad:
    """Decode: fill these blocks from the engine at ``address``. ``first`` numbers them in the order of ``groups``."""

    request: str
    key: Key
    address: str
    first: int
    blocks: list[int]
    adapter: str = ""
    """Digest of the request's LoRA adapter, "" without one."""
    tails: tuple[int, ...] = ()
    """How many of the last blocks are of each tail; see ``groups``."""


@dataclass
class Open:
    """Prefill: this request's prompt will be offered."""

    request: str
    key: Key
    total: int
    adapter: str = ""
    tails: tuple[int, ...] = ()
    """As in ``StartLoad``."""


@dataclass
class Progress:
    """Prefill: after this step the first ``ready`` of these blocks hold their KV."""

    request: str
    blocks: list[int]
    ready: int


@dataclass
class Plan:
    """All that one step asks of the worker side."""

    loads: list[StartLoad] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    releases: list[tuple[str, Key]] = field(default_factory=list)
    opens: list[Open] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    suspends: list[str] = field(default_factory=list)
    drops: list[tuple[str, str]] = field(default_factory=list)
    updated: bool = False
    """The engine's weights are updated in place: it exchanges no KV from now on."""
    idle: bool = False
    """The step computes nothing, so it may wait for transfers for ``idle_wait_ms``."""
