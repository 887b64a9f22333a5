"""Prefill's side of ``disagg_kv``: prompts that are offered, and the blocks that decode engines get.

Which blocks are sent, held or freed, and when, is decided by the real connector's state machine
(``disagg_kv/prefill/send_queue.py``). This module is its engine and its connections, on one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from disagg_kv.outcomes import UNFETCHED, Outcomes
from disagg_kv.prefill.send_queue import DecodePeer, Segment, SendQueue
from disagg_kv.protocol.keys import Key
from disagg_kv.protocol.messages import Go, Release, Want
from disagg_sim.config import SimConfig
from disagg_sim.connectors.blocks import row_bytes, rows_of
from disagg_sim.connectors.disagg_kv_wire import TICK, read_transfer
from disagg_sim.faults import Faults
from disagg_sim.request import EngineRequest


class Offers:
    """KV that this engine has promised, is computing, or holds.

    Args:
        outcomes: counts KV that is never fetched.

    Attributes:
        sent: number of blocks sent.
    """

    def __init__(self, config: SimConfig, faults: Faults, changed: Callable[[], None], outcomes: Outcomes) -> None:
        self._outcomes = outcomes
        self._config = config
        self._faults = faults
        self._changed = changed
        self._send_queue = SendQueue(config.hold_timeout, hold_blocks=config.hold_blocks or None)
        self._names: dict[EngineRequest, str] = {}
        self._offered: dict[Key, EngineRequest] = {}
        self._rows: dict[EngineRequest, list[bytes]] = {}
        self._numbers = itertools.count()
        self._peers: dict[DecodePeer, asyncio.StreamWriter] = {}
        self._timers: dict[EngineRequest, asyncio.TimerHandle] = {}
        self.sent = 0

    def stop(self) -> None:
        """Cancel every timer. Safe to call twice."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def state(self) -> dict[str, Any]:
        """The connector's part of the engine's state.

        ``kv_waiting``: bytes of KV promised or held, by request id. ``kv_wants``: number of WANTs that wait for KV.
        ``kv_sent``: number of blocks sent.
        """
        return {
            "kv_waiting": {request.id: len(self._rows[request]) * row_bytes(self._config) for request in self._names},
            "kv_wants": self._send_queue.counts()["wants"],
            "kv_sent": self.sent,
        }

    @property
    def held_blocks(self) -> int:
        return sum(len(self._rows[request]) for request in self._names if request.finished)

    # The engine.

    def begin(self, request: EngineRequest) -> None:
        """Promise the KV of a request that is scheduled, unless another request has promised the same."""
        transfer = read_transfer(request, decode=False)
        if transfer is None or transfer[0] in self._offered:
            return
        key = transfer[0]
        self._names[request] = name = str(next(self._numbers))
        self._offered[key] = request
        self._rows[request] = rows_of(self._config, request.prompt_ids)
        self._send_queue.open(key, name, len(self._rows[request]))
        self._pump()

    def progress(self, request: EngineRequest) -> None:
        """Offer the blocks of the request's prompt that are final by now."""
        name = self._names.get(request)
        if name is None:
            return
        rows = self._rows[request]
        ready = len(rows) if request.prompt_complete else request.prefilled // self._config.kv_block_size
        self._send_queue.progress(name, range(ready), ready, rows)
        self._pump()

    def finished(self, request: EngineRequest, *, aborted: bool) -> None:
        """Hold the KV of a request that has ended, or drop it when the request was aborted."""
        name = self._names.get(request)
        if name is None:
            return
        if aborted:
            self._send_queue.drop(name, "aborted")
        self._send_queue.finish([name])
        self._pump()
        if request in self._names:
            loop = asyncio.get_running_loop()
            self._timers[request] = loop.call_later(self._config.hold_timeout + TICK, self._pump)

    # The KV port.

    def attach(self, writer: asyncio.StreamWriter) -> DecodePeer:
        """Register a connection; returns the peer that stands for it in the state machine."""
        peer = self._send_queue.attach(writer.transport.abort)
        self._peers[peer] = writer
        return peer

    def detach(self, peer: DecodePeer) -> None:
        """Forget a connection that has ended."""
        del self._peers[peer]
        self._send_queue.detach(peer)
        self._pump()

    def want(self, peer: DecodePeer, want: Want) -> None:
        """Handle a decode engine's WANT."""
        self._send_queue.on_want(peer, want)
        self._pump()

    def release(self, peer: DecodePeer | None, release: Release) -> None:
        """Handle a RELEASE of a decode engine, or of the proxy (``peer`` None)."""
        self._send_queue.on_release(peer, release)
        self._pump()

    def _pump(self) -> None:
        """Send the blocks that are wanted and final, and free those that are not needed any more."""
        free = self._send_queue.collect()
        for peer, writer in list(self._peers.items()):
            while (item := self._send_queue.next(peer, 0)) is not None:
                if isinstance(item, Segment):
                    self._send(peer, writer, item)
                else:
                    writer.write(item)
        free |= self._send_queue.collect()
        self._outcomes.ended(UNFETCHED, self._send_queue.take_unfetched().elements())
        for request in [request for request, name in self._names.items() if name in free]:
            del self._names[request], self._rows[request]
            if timer := self._timers.pop(request, None):
                timer.cancel()
        self._offered = {key: request for key, request in self._offered.items() if request in self._names}
        self._changed()

    def _send(self, peer: DecodePeer, writer: asyncio.StreamWriter, segment: Segment) -> None:
        count = len(segment.blocks)
        data = b"".join(segment.fence[segment.first : segment.first + count])
        if self._faults.corrupt_kv:
            data = bytes(byte ^ 0xFF for byte in data)
        writer.write(Go(segment.key, segment.first, count, segment.last).encode() + data)
        self.sent += count
        self._send_queue.on_sent(peer, segment, True)
