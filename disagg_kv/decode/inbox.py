"""What decode waits for, as a state machine without sockets and tensors.

A *load* is one engine request whose blocks are allocated and shall be filled by a prefill engine. It ends once: filled
or failed, and then, also when the request was aborted meanwhile, it is named by ``collect`` exactly once, never while
a thread may still write its blocks. A failed load names all its blocks, and vLLM computes them.

Threads: the engine's thread starts, cancels and collects; one reader thread per prefill peer reports what happens.
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

_REMEMBERED = 8192
"""Released transfers that are remembered, for requests that are scheduled later."""
_CANCELLED = "cancelled"


@dataclass(eq=False)
class Load:
    key: Key
    request: str
    blocks: Sequence[int]
    """Block ids to fill: the blocks ``first``, ``first + 1``, ... of the prompt."""
    first: int
    deadline: float
    peer: str = ""
    """Name of the connection that it waits for."""
    fence: Any = None
    """What a receiver has to wait for before it writes the blocks (a CUDA event, or None)."""
    filled: int = 0
    writing: bool = False
    failed: str = ""
    done: bool = False
    adapter: str = ""
    """Digest of the request's LoRA adapter."""

    def want(self) -> Want:
        return Want(self.key, self.first, len(self.blocks), self.adapter)


@dataclass(frozen=True)
class Collected:
    """What the engine has to be told since the last time."""

    requests: frozenset[str] = frozenset()
    """Requests whose load is over."""
    failed_blocks: frozenset[int] = frozenset()
    """Blocks that were not filled; the requests they belong to are in ``requests``."""
    reasons: tuple[str, ...] = ()
    """Why loads failed, one for each; none for a request that was aborted."""
    unwanted: tuple[tuple[str, Key], ...] = ()
    """Peer and key of loads that were given up while the peer may still hold the blocks."""


class Inbox:
    """Loads by key, and the news about them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._loads: dict[Key, Load] = {}
        self._by_request: dict[str, Load] = {}
        self._over: list[Load] = []
        self._unwanted: list[tuple[str, Key]] = []
        self._released: OrderedDict[str, None] = OrderedDict()

    # The engine's thread.

    def start(self, load: Load) -> None:
        with self._changed:
            if load.key in self._loads or load.key.transfer in self._released:
                load.failed = "released" if load.key.transfer in self._released else "the same KV is being loaded"
                self._over.append(load)
                return
            self._loads[load.key] = self._by_request[load.request] = load

    def cancel(self, request: str) -> None:
        """The request was aborted: its blocks are needed for others as soon as nobody writes them."""
        with self._changed:
            load = self._by_request.get(request)
            if load is not None:
                self._give_up(load, _CANCELLED)

    def collect(self) -> Collected:
        with self._changed:
            now = self._clock()
            for load in list(self._loads.values()):
                if now >= load.deadline and not load.failed:
                    self._give_up(load, "not here in time")
            over, self._over = self._over, []
            unwanted, self._unwanted = self._unwanted, []
        failed = frozenset(block for load in over if load.failed for block in load.blocks)
        reasons = tuple(load.failed for load in over if load.failed not in ("", _CANCELLED))
        return Collected(frozenset(load.request for load in over), failed, reasons, tuple(unwanted))

    def wait(self, seconds: float) -> None:
        """Returns early when there is something to collect."""
        with self._changed:
            if self._loads and not self._over:
                self._changed.wait(seconds)

    def waiting(self) -> int:
        """Loads that are not over."""
        with self._changed:
            return len(self._loads)

    def waits_for(self, peer: str) -> bool:
        """Whether a load waits for this connection."""
        with self._changed:
            return any(load.peer == peer for load in self._loads.values())

    # Another connection's thread.

    def release(self, transfer: str) -> None:
        """The proxy says that this KV will not come: what waits for it fails now, and what asks for it later too."""
        with self._changed:
            self._released[transfer] = None
            while len(self._released) > _REMEMBERED:
                self._released.popitem(last=False)
            for load in [load for load in self._loads.values() if load.key.transfer == transfer]:
                self._give_up(load, "released")

    # A peer's reader thread.

    def go(self, peer: str, go: Go) -> Load | None:
        """The load whose blocks the peer sends now: ``filled`` says where they belong, ``arrived`` must follow. None
        if nobody wants them (any more): the bytes have to be thrown away. WireError if they are not those asked for.
        """
        with self._changed:
            load = self._loads.get(go.key)
            if load is None or load.peer != peer or load.failed:
                return None
            left = len(load.blocks) - load.filled
            if go.first != load.first + load.filled or go.count > left or go.last is not (go.count == left):
                raise WireError(f"blocks {go.first}+{go.count} were sent, {load.first + load.filled}+{left} are wanted")
            load.writing = True
            return load

    def arrived(self, load: Load, count: int, ok: bool) -> None:
        """The blocks announced by GO are in the cache (``ok``), or nobody will write them."""
        with self._changed:
            load.writing = False
            if ok:
                load.filled += count
            if load.failed or not ok or load.filled == len(load.blocks):
                load.failed = load.failed or ("" if ok else "the connection broke")
                self._finish(load)

    def gone(self, peer: str, key: Key, reason: str) -> None:
        with self._changed:
            load = self._loads.get(key)
            if load is not None and load.peer == peer:
                load.failed = load.failed or reason or "gone"
                self._finish(load)

    def refuse_adapters(self, peer: str) -> None:
        """The peer does not compare adapters: nothing that depends on one is taken from there."""
        with self._changed:
            for load in [load for load in self._loads.values() if load.peer == peer and load.adapter]:
                self._give_up(load, "the prefill engine does not compare LoRA adapters")

    def lost(self, peer: str, reason: str) -> None:
        """The peer cannot be reached, or the connection broke. Comes after ``arrived`` for what was being written."""
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
        self._over.append(load)
        self._changed.notify_all()
