"""Which transport runs to which prefill engine, and which ones failed to open. No I/O.

NCCL, for example, refuses two ranks on one GPU every time. A transport that failed is left out of later offers to the
same process; another process at the address, or the time, gives it a new chance.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

FORGET_SECONDS = 600.0
_MAX_ADDRESSES = 1024
_MAX_REASON_LENGTH = 120


@dataclass
class _Peer:
    boot: str = ""
    since: float = 0.0
    """When a transport failed last."""
    failed: dict[str, str] = field(default_factory=dict)
    """Reasons by name."""
    running: str = ""
    passed_over: dict[str, str] = field(default_factory=dict)
    """Preferred transports that these two engines cannot use, with the reasons."""


class TransportMemory:
    """Thread-safe; addresses are those of rank 0."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._peers: OrderedDict[str, _Peer] = OrderedDict()

    def offer(self, address: str, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Return which of ``names`` to offer, in their order, and why others are left out."""
        with self._lock:
            peer = self._peers.get(address, _Peer())
            if self._clock() - peer.since >= FORGET_SECONDS:
                peer.failed = {}
            usable = [name for name in names if name not in peer.failed]
            return (usable, dict(peer.failed)) if usable else (list(names), {})

    def failed(self, address: str, boot: str, name: str, reason: str) -> None:
        with self._lock:
            peer = self._peer(address)
            peer.boot, peer.since, peer.running = boot, self._clock(), ""
            peer.failed[name] = reason[:_MAX_REASON_LENGTH]

    def is_new_process(self, address: str, boot: str) -> bool:
        """Whether failures at this address are those of another process; they are forgotten then."""
        with self._lock:
            peer = self._peers.get(address)
            if peer is None or not peer.failed or peer.boot == boot:
                return False
            peer.failed = {}
            return True

    def opened(self, address: str, name: str, passed_over: Mapping[str, str] | None = None) -> None:
        with self._lock:
            peer = self._peer(address)
            peer.running, peer.passed_over = name, dict(passed_over or {})

    def closed(self, address: str, name: str) -> None:
        """Record the end of a connection; a later one over another transport is not affected."""
        with self._lock:
            peer = self._peer(address)
            if peer.running == name:
                peer.running = ""

    def running(self) -> dict[str, str]:
        """Return the transport of each open connection, with the reason where a preferred one is not used."""
        with self._lock:
            return {address: _describe(peer) for address, peer in self._peers.items() if peer.running}

    def _peer(self, address: str) -> _Peer:
        peer = self._peers.setdefault(address, _Peer())
        self._peers.move_to_end(address)
        while len(self._peers) > _MAX_ADDRESSES:
            self._peers.popitem(last=False)
        return peer


def _describe(peer: _Peer) -> str:
    unused = [f"{name} not used: {why}" for name, why in peer.passed_over.items() if name not in peer.failed]
    return "; ".join([peer.running, *unused, *(f"{name} failed: {why}" for name, why in peer.failed.items())])
