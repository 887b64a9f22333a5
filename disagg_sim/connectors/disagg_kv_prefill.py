"""Prefill's side of this project's own connector: prompts that are offered, and what decode engines get of them.

The rules of who gets what and when are the connector's own state machine (``disagg_kv/prefill/outbox.py``); this is
its engine (offers, blocks that become final, requests that end) and its senders, on one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from disagg_kv.prefill.outbox import Lane, Outbox, Segment
from disagg_kv.protocol.keys import Key
from disagg_kv.protocol.messages import Go, Release, Want
from disagg_sim.config import SimConfig
from disagg_sim.connectors.disagg_kv_wire import read_transfer, row_bytes, rows_of
from disagg_sim.faults import Faults
from disagg_sim.request import EngineRequest

_TICK = 0.01
"""Seconds by which timers are late, so that a deadline is surely over."""


class Offers:
    """KV that this engine has promised, computes, or holds.

    Attributes:
        sent: blocks that went out.
    """

    def __init__(self, config: SimConfig, faults: Faults, changed: Callable[[], None]) -> None:
        self._config = config
        self._faults = faults
        self._changed = changed
        self._outbox = Outbox(config.hold_timeout, hold_blocks=config.hold_blocks or None)
        self._names: dict[EngineRequest, str] = {}
        self._offered: dict[Key, EngineRequest] = {}
        self._rows: dict[EngineRequest, list[bytes]] = {}
        self._numbers = itertools.count()
        self._lanes: dict[Lane, asyncio.StreamWriter] = {}
        self._timers: dict[EngineRequest, asyncio.TimerHandle] = {}
        self.sent = 0

    def stop(self) -> None:
        """Forget every deadline."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def state(self) -> dict[str, Any]:
        """``kv_waiting``: bytes by request id of what is promised or held; ``kv_wants``: WANTs without KV yet."""
        return {
            "kv_waiting": {request.id: len(self._rows[request]) * row_bytes(self._config) for request in self._names},
            "kv_wants": self._outbox.held()["wants"],
            "kv_sent": self.sent,
        }

    # The engine.

    def begin(self, request: EngineRequest) -> None:
        """A request is scheduled: its KV is promised, unless another request has promised the same."""
        transfer = read_transfer(request, decode=False)
        if transfer is None or transfer[0] in self._offered:
            return
        key = transfer[0]
        self._names[request] = name = str(next(self._numbers))
        self._offered[key] = request
        self._rows[request] = rows_of(self._config, request.prompt_ids)
        self._outbox.open(key, name, len(self._rows[request]))
        self._pump()

    def progress(self, request: EngineRequest) -> None:
        """More of the prompt is computed."""
        name = self._names.get(request)
        if name is None:
            return
        rows, done = self._rows[request], request.prefilled
        ready = len(rows) if done == len(request.prompt_ids) else done // self._config.kv_block_size
        self._outbox.progress(name, range(ready), ready, rows)
        self._pump()

    def finished(self, request: EngineRequest, *, aborted: bool) -> None:
        """A request has ended; its KV is held for decode, unless it was aborted."""
        name = self._names.get(request)
        if name is None:
            return
        if aborted:
            self._outbox.drop(name, "aborted")
        self._outbox.finish([name])
        self._pump()
        if request in self._names:
            loop = asyncio.get_running_loop()
            self._timers[request] = loop.call_later(self._config.hold_timeout + _TICK, self._pump)

    # The KV port.

    def attach(self, writer: asyncio.StreamWriter) -> Lane:
        """A connection is there."""
        lane = self._outbox.attach(writer.transport.abort)
        self._lanes[lane] = writer
        return lane

    def detach(self, lane: Lane) -> None:
        """It is gone."""
        del self._lanes[lane]
        self._outbox.detach(lane)
        self._pump()

    def want(self, lane: Lane, want: Want) -> None:
        """A decode engine asks for KV."""
        self._outbox.want(lane, want)
        self._pump()

    def release(self, lane: Lane | None, release: Release) -> None:
        """A decode engine, or (None) the proxy, needs it no more."""
        self._outbox.release(lane, release)
        self._pump()

    def _pump(self) -> None:
        """Send what can be sent, and free what nobody needs."""
        free = self._outbox.collect()
        for lane, writer in list(self._lanes.items()):
            while (item := self._outbox.next(lane, 0)) is not None:
                if isinstance(item, Segment):
                    self._send(lane, writer, item)
                else:
                    writer.write(item)
        free |= self._outbox.collect()
        for request in [request for request, name in self._names.items() if name in free]:
            del self._names[request], self._rows[request]
            if timer := self._timers.pop(request, None):
                timer.cancel()
        self._offered = {key: request for key, request in self._offered.items() if request in self._names}
        self._changed()

    def _send(self, lane: Lane, writer: asyncio.StreamWriter, segment: Segment) -> None:
        count = len(segment.blocks)
        data = b"".join(segment.fence[segment.first : segment.first + count])
        if self._faults.corrupt_kv:
            data = bytes(byte ^ 0xFF for byte in data)
        writer.write(Go(segment.key, segment.first, count, segment.last).encode() + data)
        self.sent += count
        self._outbox.sent(lane, segment, True)
