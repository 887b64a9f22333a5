"""What the scheduler half tells the worker half in one step. Plain data that travels pickled."""

from __future__ import annotations

from dataclasses import dataclass, field

from disagg_kv.protocol.keys import Key


@dataclass
class StartLoad:
    """Decode: fill these blocks (``first`` is the prompt's number of the first) from the engine at ``address``."""

    request: str
    key: Key
    address: str
    first: int
    blocks: list[int]
    adapter: str = ""
    """Digest of the request's LoRA adapter, "" without one."""


@dataclass
class Open:
    """Prefill: this request's prompt will be offered."""

    request: str
    key: Key
    total: int
    adapter: str = ""
    """As of ``StartLoad``."""


@dataclass
class Progress:
    """Prefill: after this step the first ``ready`` of these blocks hold their KV."""

    request: str
    blocks: list[int]
    ready: int


@dataclass
class Plan:
    loads: list[StartLoad] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    releases: list[tuple[str, Key]] = field(default_factory=list)
    opens: list[Open] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    suspends: list[str] = field(default_factory=list)
    drops: list[tuple[str, str]] = field(default_factory=list)
    updated: bool = False
    """The engine's weights are written in place: it exchanges no KV from now on."""
    idle: bool = False
    """The step computes nothing: it may wait a moment for news instead of being run again at once."""
