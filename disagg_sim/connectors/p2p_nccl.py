"""vLLM's P2pNcclConnector: KV is sent and waited for inside steps, under the request's id.

As in vLLM 0.21 (``p2p_nccl_connector.py``, ``v1/core/sched/scheduler.py``). A decode engine waits in its forward pass
for KV that has not come, and with it wait all other requests, aborts included. A prefill step ends when the KV has been
handed over, so a decode engine that does not answer stalls the prefill engine indefinitely.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from disagg_sim.config import SimConfig
from disagg_sim.connectors.base import KvConnector
from disagg_sim.connectors.p2p_nccl_listener import KvListener
from disagg_sim.connectors.p2p_nccl_memory import ReceiveStore
from disagg_sim.connectors.p2p_nccl_sender import KvSender, SendItem
from disagg_sim.faults import Faults
from disagg_sim.request import EngineRequest, ReceivedKv, WorkerError, peer_address
from disagg_sim.text import SEED_BYTES, seed_of


class P2pNccl(KvConnector):
    """Prefill sends to the address in the request's id; decode takes in whatever any prefill engine sends."""

    unique_ids = True

    def __init__(self, config: SimConfig, faults: Faults, kv_address: str, changed: Callable[[], None]) -> None:
        self._config = config
        self._changed = changed
        self._arrived = asyncio.Event()
        self._known_prefills: set[str] = set()
        self._store = ReceiveStore(config.kv_buffer_bytes, config.kv_pool_bytes, config.kv_layers, self._stored)
        self._sender = KvSender(kv_address, changed)
        self._listener = KvListener(config, faults, self._store, changed)

    def _stored(self) -> None:
        self._arrived.set()
        self._changed()

    async def start(self, sock: socket.socket) -> None:
        await self._listener.start(sock)
        self._sender.start()

    async def stop(self) -> None:
        await self._listener.stop()
        await self._sender.stop()

    def state(self) -> dict[str, Any]:
        store = self._store
        return {
            "kv_waiting": store.waiting(),
            "kv_buffer_used": store.buffer_used,
            "kv_pool_used": store.pool.used,
            "kv_received": self._listener.received,
            "kv_sent": self._sender.sent,
            "listener": self._listener.death or "alive",
            "sender": self._sender.state(),
        }

    def check_batch(self, running: Sequence[EngineRequest]) -> None:
        if self._config.is_producer:
            for request in running:
                if request.prompt_complete:
                    raise WorkerError(f"AssertionError: req_id in self.chunked_prefill ({request.id})")

    def begin(self, request: EngineRequest) -> bool:
        # Decode takes for granted that all but the last token, which is always computed here, comes from prefill.
        if not self._config.is_producer:
            request.external_tokens = len(request.prompt_ids) - 1
        return False

    def finished(self, request: EngineRequest, *, aborted: bool) -> None:
        self._store.release(request.id)

    async def load(self, fresh: Sequence[EngineRequest]) -> None:
        for request in fresh:
            if not request.external_tokens:
                continue
            prefill = peer_address(request.id, is_prefill=False)
            seed, garbage = b"", False
            for layer in range(self._config.kv_layers):
                await self._wait_for(request.id, layer)
                tensor = self._store.load(request.id, layer)
                seed += tensor.seed_part
                garbage = garbage or tensor.tokens != len(request.prompt_ids)
            if prefill not in self._known_prefills:
                self._known_prefills.add(prefill)
                await asyncio.sleep(self._config.communicator_seconds)
            request.received = ReceivedKv(seed, garbage)

    async def _wait_for(self, request_id: str, layer: int) -> None:
        while not self._store.has(request_id, layer):
            self._arrived.clear()
            self.stalled_on = request_id
            self._changed()
            await self._arrived.wait()
        self.stalled_on = None

    async def save(self, computed: Sequence[EngineRequest]) -> None:
        complete = [request for request in computed if request.prompt_complete]
        if not self._config.is_producer or not complete:
            return
        for layer in range(self._config.kv_layers):
            for request in complete:
                self._sender.put(self._tensor(request, layer))
        self.stalled_on = complete[0].id
        self._changed()
        await self._sender.wait_for_sent()
        self.stalled_on = None

    def _tensor(self, request: EngineRequest, layer: int) -> SendItem:
        config, seed, half, count = self._config, seed_of(request.prompt_ids), SEED_BYTES // 2, len(request.prompt_ids)
        last = config.kv_layers - 1
        part = seed[:half] if layer == 0 else seed[half:] if layer == last else b""
        size = max(1, count * config.kv_bytes_per_token // config.kv_layers)
        padding = count * config.kv_wire_bytes_per_token // config.kv_layers
        return SendItem(request.id, layer, peer_address(request.id, is_prefill=True), part, count, size, padding)
