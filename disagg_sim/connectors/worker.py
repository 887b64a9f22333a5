"""The part of an engine that exchanges KV, by connector: its step loop, its KV port, and what both show.

p2p_nccl    vLLM's P2pNcclConnector, with everything that goes wrong with it
disagg_kv   this project's own connector
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from disagg_sim.config import SimConfig
from disagg_sim.connectors.disagg_kv_decode import Loads
from disagg_sim.connectors.disagg_kv_loop import OwnStepLoop
from disagg_sim.connectors.disagg_kv_prefill import Offers
from disagg_sim.connectors.disagg_kv_server import OwnKvServer
from disagg_sim.connectors.disagg_kv_wire import announcement, identity
from disagg_sim.connectors.nixl import Kept, Reads
from disagg_sim.connectors.p2p_nccl_listener import KvListener
from disagg_sim.connectors.p2p_nccl_memory import ReceiveStore
from disagg_sim.connectors.p2p_nccl_sender import KvSender
from disagg_sim.faults import Faults
from disagg_sim.metrics import Counters
from disagg_sim.step_loop import StepLoop


class Worker(Protocol):
    """What an engine needs of either."""

    @property
    def loop(self) -> StepLoop: ...

    async def start(self, sock: socket.socket) -> None:
        """Begin on the bound KV port."""

    async def stop(self) -> None:
        """End all exchange of KV at once. Safe to call twice."""

    def announces(self) -> dict[str, Any]:
        """Fields of its pings besides role and addresses."""

    def state(self) -> dict[str, Any]:
        """Its part of the engine's state."""


class P2pWorker:
    """vLLM's P2pNcclConnector."""

    def __init__(
        self,
        config: SimConfig,
        faults: Faults,
        counters: Counters,
        kv_address: str,
        changed: Callable[[], None],
        died: Callable[[], None],
    ) -> None:
        def kv_changed() -> None:
            self.loop.kv_changed()
            changed()

        self._store = ReceiveStore(config.kv_buffer_bytes, config.kv_pool_bytes, config.kv_layers, kv_changed)
        self._sender = KvSender(kv_address, changed)
        self._listener = KvListener(config, faults, self._store, changed)
        self.loop = StepLoop(config, faults, self._store, self._sender, counters, changed, died)

    async def start(self, sock: socket.socket) -> None:
        await self._listener.start(sock)
        self._sender.start()
        self.loop.start()

    async def stop(self) -> None:
        await self._listener.stop()
        await self._sender.stop()

    def announces(self) -> dict[str, Any]:
        return {}

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


class OwnWorker:
    """This project's own connector. ``boot`` differs for every one of them."""

    def __init__(
        self,
        config: SimConfig,
        faults: Faults,
        counters: Counters,
        kv_address: str,
        changed: Callable[[], None],
        died: Callable[[], None],
    ) -> None:
        self.boot = uuid.uuid4().hex
        self._config = config
        me = identity(config, self.boot)
        unused = ReceiveStore(0, 1, config.kv_layers, changed)
        self.loop = OwnStepLoop(config, faults, unused, KvSender(kv_address, changed), counters, changed, died)
        self._offers = Offers(config, faults, changed)
        self._loads = None if config.is_producer else Loads(config, me, self.loop.loaded, changed)
        self._server = OwnKvServer(config, me, faults, self._offers, self._loads)
        self.loop.connect(self._offers, self._loads)

    async def start(self, sock: socket.socket) -> None:
        await self._server.start(sock)
        self.loop.start()

    async def stop(self) -> None:
        await self._server.stop()
        self._offers.stop()
        if self._loads is not None:
            await self._loads.stop()

    def announces(self) -> dict[str, Any]:
        return announcement(self._config, self.boot)

    def state(self) -> dict[str, Any]:
        side = self._offers if self._loads is None else self._loads
        return {"boot_id": self.boot, "kv_buffer_used": 0, "listener": "alive", "sender": None, **side.state()}


class NixlWorker:
    """vLLM's NixlConnector."""

    def __init__(
        self,
        config: SimConfig,
        faults: Faults,
        counters: Counters,
        kv_address: str,
        changed: Callable[[], None],
        died: Callable[[], None],
    ) -> None:
        unused = ReceiveStore(0, 1, config.kv_layers, changed)
        self.loop = OwnStepLoop(config, faults, unused, KvSender(kv_address, changed), counters, changed, died)
        self._kept = Kept(config, uuid.uuid4().hex, kv_address, changed)
        self._reads = None if config.is_producer else Reads(config, self.loop.loaded)
        self.loop.connect(self._kept, self._reads)

    async def start(self, sock: socket.socket) -> None:
        await self._kept.start(sock)
        self.loop.start()

    async def stop(self) -> None:
        await self._kept.stop()
        if self._reads is not None:
            await self._reads.stop()

    def announces(self) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        side = self._kept if self._reads is None else self._reads
        return {"kv_buffer_used": 0, "listener": "alive", "sender": None, **side.state()}


def make_worker(config: SimConfig, *args: Any) -> Worker:
    """The worker of this engine's connector."""
    workers: dict[str, Callable[..., Worker]] = {"p2p_nccl": P2pWorker, "disagg_kv": OwnWorker, "nixl": NixlWorker}
    return workers[config.connector](config, *args)
