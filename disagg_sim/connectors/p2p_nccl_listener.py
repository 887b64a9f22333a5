"""The receiving side of KV transfer: one listener that serves all peers, one message after the other.

Mirrors ``P2pNcclEngine.listen_for_requests`` of vLLM 0.21, where one thread does everything and only CUDA's
out-of-memory error is caught: a full pool, or a tensor from a peer whose communicator it does not know, ends the
thread. The process stays up, no peer is notified, and every sender waits indefinitely for an answer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

from disagg_sim.config import SimConfig
from disagg_sim.connectors.kv_port import KvPort
from disagg_sim.connectors.p2p_nccl_memory import InsufficientMemory, KvTensor, ReceiveStore
from disagg_sim.faults import Faults
from disagg_sim.kv_wire import pack, read_frame

logger = logging.getLogger(__name__)


class _Peer:
    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.data: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def send(self, frame: dict[str, Any]) -> None:
        if not self.writer.is_closing():
            self.writer.write(pack(frame))


class KvListener:
    """Accepts KV and puts it into ``store``.

    Attributes:
        death: the exception that ended the listener, as text; None while it works.
        received: number of tensors received so far.
    """

    def __init__(self, config: SimConfig, faults: Faults, store: ReceiveStore, changed: Callable[[], None]) -> None:
        self._config = config
        self._faults = faults
        self._store = store
        self._changed = changed
        self._frames: asyncio.Queue[tuple[_Peer, dict[str, Any]]] = asyncio.Queue()
        self._communicators: dict[str, str] = {}
        self._port = KvPort(self._serve)
        self._task: asyncio.Task[None] | None = None
        self.death: str | None = None
        self.received = 0

    async def start(self, sock: socket.socket) -> None:
        """Listen on a bound socket."""
        await self._port.start(sock)
        self._task = asyncio.create_task(self._listen(), name="kv-listener")

    async def stop(self) -> None:
        """Reset every connection and end. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._port.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _Peer(writer)
        while (frame := await read_frame(reader)) is not None:
            if frame["cmd"] == "DATA":
                peer.data.put_nowait(frame)
            else:
                self._frames.put_nowait((peer, frame))

    async def _listen(self) -> None:
        try:
            while True:
                peer, frame = await self._frames.get()
                if frame["cmd"] == "NEW":
                    await asyncio.sleep(self._config.communicator_seconds)
                    self._communicators[frame["from"]] = frame["communicator"]
                    peer.send({"cmd": "READY"})
                elif frame["cmd"] == "PUT":
                    await self._receive(peer, frame)
        except (InsufficientMemory, KeyError) as error:
            self.death = f"{type(error).__name__}: {error}"
            logger.error("The KV listener died (%s); prefill engines that send here hang", self.death)
            self._changed()

    async def _receive(self, peer: _Peer, frame: dict[str, Any]) -> None:
        # The order is vLLM's: the sender gets "0" before the communicator is looked up and before memory is allocated.
        peer.send({"cmd": "ACK", "ret": "0"})
        self._communicators[frame["from"]]
        data = await peer.data.get()
        tensor = KvTensor(data["seed_part"], frame["tokens"], frame["size"])
        if not self._faults.loses(frame["request_id"], first=frame["layer"] == 0):
            self._store.put(frame["request_id"], frame["layer"], tensor)
        self.received += 1
        self._changed()
