"""Decode's state machine of loads, without sockets and tensors.

A *load* is one engine request whose allocated blocks are to be filled by a prefill engine. It ends once, filled or
failed. ``collect`` then names it exactly once, also when the request was aborted meanwhile, and never while a thread
may still write its blocks. A failed load names all its blocks, and vLLM computes them.

Threads: the engine's thread starts, cancels and collects loads; one reader thread per prefill peer reports events.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from disagg_kv.protocol.frames import WireError
from disagg_kv.protocol.keys import Key
from disagg_kv.protocol.messages import Go, Want

_MAX_REMEMBERED = 8192
"""Number of released transfers to remember, for requests that are scheduled later."""
_CANCELLED = "cancelled"


@dataclass(eq=False)
class Load:
    """One load. ``key`` and ``request`` name it; ``failed`` is the reason, "" while it has not failed."""

    key: Key
    request: str
    blocks: Sequence[int]
    """Block ids to fill: blocks ``first``, ``first + 1``, ... of the prompt in the order of ``engine/groups.py``."""
    first: int
    deadline: float
    peer: str = ""
    """Name of the connection that sends the blocks."""
    fence: Any = None
    """CUDA event that a receiver waits for before it writes the blocks, or None."""
    filled: int = 0
    writing: bool = False
    failed: str = ""
    done: bool = False
    adapter: str = ""
    """Digest of the request's LoRA adapter."""
    tails: tuple[int, ...] = ()
    """As in ``Want``."""

    def want(self) -> Want:
        return Want(self.key, self.first, len(self.blocks), self.adapter, self.tails)


@dataclass(frozen=True)
class Collected:
    """Result of ``PendingLoads.collect``: what changed since the last call."""

    requests: frozenset[str] = frozenset()
    """Requests whose load has ended."""
    failed_blocks: frozenset[int] = frozenset()
    """Blocks that were not filled; their requests are in ``requests``."""
    reasons: tuple[str, ...] = ()
    """One reason per failed load, except for aborted requests."""
    loaded: frozenset[str] = frozenset()
    """Those of ``requests`` whose blocks were all filled; the others have failed."""
    unwanted: tuple[tuple[str, Key], ...] = ()
    """Peer and key of loads that were given up while the peer may still hold the blocks; RELEASE is to be sent."""


class PendingLoads:
    """Loads that have not ended, by key, and ended ones until they are collected."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._loads: dict[Key, Load] = {}
        self._by_request: dict[str, Load] = {}
        self._ended: list[Load] = []
        self._unwanted: list[tuple[str, Key]] = []
        self._released: OrderedDict[str, None] = OrderedDict()

    # The engine's thread.

    def start(self, load: Load) -> None:
        """Register a load. It fails at once if its transfer was released or the same KV is already being loaded."""
        with self._changed:
            if load.key in self._loads or load.key.transfer in self._released:
                load.failed = "released" if load.key.transfer in self._released else "the same KV is being loaded"
                self._ended.append(load)
                return
            self._loads[load.key] = self._by_request[load.request] = load

    def cancel(self, request: str) -> None:
        """Give up the load of an aborted request; its blocks may be reused once no thread writes them."""
        with self._changed:
            load = self._by_request.get(request)
            if load is not None:
                self._give_up(load, _CANCELLED)

    def collect(self) -> Collected:
        """Fail loads past their deadline, and return the loads that have ended since the last call."""
        with self._changed:
            now = self._clock()
            for load in list(self._loads.values()):
                if now >= load.deadline and not load.failed:
                    self._give_up(load, "not received in time")
            ended, self._ended = self._ended, []
            unwanted, self._unwanted = self._unwanted, []
        failed = frozenset(block for load in ended if load.failed for block in load.blocks)
        reasons = tuple(load.failed for load in ended if load.failed not in ("", _CANCELLED))
        loaded = frozenset(load.request for load in ended if not load.failed)
        return Collected(frozenset(load.request for load in ended), failed, reasons, loaded, tuple(unwanted))

    def wait(self, seconds: float) -> None:
        """Wait up to ``seconds`` for a load to end. Returns at once if there is nothing to wait for."""
        with self._changed:
            if self._loads and not self._ended:
                self._changed.wait(seconds)

    def waiting(self) -> int:
        """Number of loads that have not ended."""
        with self._changed:
            return len(self._loads)

    def waits_for(self, peer: str) -> bool:
        """Whether a load waits for this connection."""
        with self._changed:
            return any(load.peer == peer for load in self._loads.values())

    # A control connection's thread.

    def release(self, transfer: str) -> None:
        """Handle the proxy's RELEASE: loads of this transfer fail now, and later ones when they start."""
        with self._changed:
            self._released[transfer] = None
            while len(self._released) > _MAX_REMEMBERED:
                self._released.popitem(last=False)
            for load in [load for load in self._loads.values() if load.key.transfer == transfer]:
                self._give_up(load, "released")

    # A peer's reader thread.

    def on_go(self, peer: str, go: Go) -> Load | None:
        """Return the load whose blocks the peer sends now; ``on_received`` must follow.

        ``filled`` tells where the blocks belong. None if no load needs them (any more): the bytes are to be discarded.

        Raises:
            WireError: these are not the requested blocks.
        """
        with self._changed:
            load = self._loads.get(go.key)
            if load is None or load.peer != peer or load.failed:
                return None
            left = len(load.blocks) - load.filled
            if go.first != load.first + load.filled or go.count > left or go.last is not (go.count == left):
                got, expected = f"{go.first}+{go.count} (last: {go.last})", f"{load.first + load.filled}+{left}"
                raise WireError(f"received blocks {got}, expected {expected}")
            load.writing = True
            return load

    def on_received(self, load: Load, count: int, ok: bool) -> None:
        """Record that the blocks of a GO are in the cache (``ok``), or that no thread will write them."""
        with self._changed:
            load.writing = False
            if ok:
                load.filled += count
            if load.failed or not ok or load.filled == len(load.blocks):
                load.failed = load.failed or ("" if ok else "the connection broke")
                self._finish(load)

    def on_gone(self, peer: str, key: Key, reason: str) -> None:
        """Fail a load whose blocks the peer will not send."""
        with self._changed:
            load = self._loads.get(key)
            if load is not None and load.peer == peer:
                load.failed = load.failed or reason or "gone"
                self._finish(load)

    def refuse_adapters(self, peer: str) -> None:
        """Fail loads with a LoRA adapter from a peer whose release does not compare adapters."""
        with self._changed:
            for load in [load for load in self._loads.values() if load.peer == peer and load.adapter]:
                self._give_up(load, "the prefill engine does not compare LoRA adapters")

    def on_connection_lost(self, peer: str, reason: str) -> None:
        """Fail all loads of a peer that cannot be reached or whose connection broke.

        Called after ``on_received`` for blocks that were being written.
        """
        with self._changed:
            for load in [load for load in self._loads.values() if load.peer == peer]:
                load.failed = load.failed or reason
                self._finish(load)

    # Under the lock.

    def _give_up(self, load: Load, reason: str) -> None:
        if not load.failed:
            load.failed = reason
            self._unwanted.append((load.peer, load.key))
        if not load.writing:
            self._finish(load)

    def _finish(self, load: Load) -> None:
        if load.done:
            return
        load.done = True
        self._loads.pop(load.key, None)
        self._by_request.pop(load.request, None)
        self._ended.append(load)
        self._changed.notify_all()
