"""The sending side of KV transfer: one queue, one sender, no time-out anywhere.

Mirrors ``P2pNcclEngine`` of vLLM 0.21 with send_type PUT_ASYNC. ``send_sync`` announces a tensor, waits for the
answer and then sends the data; ``wait_for_sent`` returns when the queue is empty, which is one tensor before all
of them have arrived. The sender waits for a peer that is gone, because ZMQ reconnects without an error; a peer that has
restarted is not in the NCCL communicator, so it never receives the data.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from disagg_sim.config import split_address
from disagg_sim.kv_wire import pack, read_frame, reset

_RECONNECT_SECONDS = 0.1  # ZMQ_RECONNECT_IVL's default


@dataclass(frozen=True)
class SendItem:
    """One tensor to send. ``size``: bytes that the receiver counts; ``padding``: bytes sent beside the seed."""

    request_id: str
    layer: int
    remote_address: str
    seed_part: bytes
    tokens: int
    size: int
    padding: int


class _Channel:
    """A connection that is made again whenever it ends; frames written to a broken one are lost."""

    def __init__(self, address: str, changed: Callable[[], None]) -> None:
        self.address = address
        self.generation = 0
        self.communicator: int | None = None
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outbox: deque[bytes] = deque()
        self._writer: asyncio.StreamWriter | None = None
        self._changed = changed
        self.task = asyncio.create_task(self._run(), name=f"kv-channel-{address}")

    @property
    def connected(self) -> bool:
        return self._writer is not None

    def send(self, frame: dict[str, Any]) -> None:
        if self._writer is None:
            self._outbox.append(pack(frame))
        else:
            self._writer.write(pack(frame))

    async def _run(self) -> None:
        try:
            while True:
                try:
                    host, port = split_address(self.address)
                    reader, self._writer = await asyncio.open_connection(host, port)
                except (OSError, ValueError):
                    await asyncio.sleep(_RECONNECT_SECONDS)
                    continue
                self.generation += 1
                while self._outbox:
                    self._writer.write(self._outbox.popleft())
                self._changed()
                while (frame := await read_frame(reader)) is not None:
                    self.inbox.put_nowait(frame)
                self._drop()
                self._changed()
        finally:
            self._drop()

    def _drop(self) -> None:
        if self._writer is not None:
            reset(self._writer.transport)
            self._writer = None


class KvSender:
    """Sends tensors in order.

    Attributes:
        sent: number of tensors whose data was sent.
    """

    def __init__(self, own_address: str, changed: Callable[[], None]) -> None:
        self._own_address = own_address
        self._changed = changed
        self._queue: deque[SendItem] = deque()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._channels: dict[str, _Channel] = {}
        self._current: SendItem | None = None
        self._phase = ""
        self._task: asyncio.Task[None] | None = None
        self.sent = 0

    def start(self) -> None:
        """Begin to send what is queued."""
        self._task = asyncio.create_task(self._run(), name="kv-sender")

    async def stop(self) -> None:
        """Reset every connection and end. Safe to call twice."""
        tasks = [channel.task for channel in self._channels.values()]
        if self._task is not None:
            tasks.append(self._task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def put(self, item: SendItem) -> None:
        """Queue one tensor."""
        self._queue.append(item)
        self._emptied.clear()
        self._filled.set()

    async def wait_for_sent(self) -> None:
        """Return when the queue is empty; the last tensor may still be under way, as in vLLM."""
        await self._emptied.wait()

    def state(self) -> dict[str, Any] | None:
        """The tensor being sent: its receiver, request, phase, and whether the receiver is connected; None when idle.

        Phases: "communicator" (waits for a new receiver), "ack", "data" (waits indefinitely if the communicator's peer
        is gone).
        """
        item = self._current
        if item is None:
            return None
        channel = self._channels.get(item.remote_address)
        return {
            "to": item.remote_address,
            "request_id": item.request_id,
            "layer": item.layer,
            "phase": self._phase,
            "connected": channel is not None and channel.connected,
        }

    async def _run(self) -> None:
        while True:
            while not self._queue:
                self._filled.clear()
                await self._filled.wait()
            self._current = self._queue.popleft()
            if not self._queue:
                self._emptied.set()
            await self._send(self._current)
            self._current = None
            self._changed()

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._changed()

    async def _send(self, item: SendItem) -> None:
        channel = self._channels.get(item.remote_address)
        if channel is None:
            channel = self._channels[item.remote_address] = _Channel(item.remote_address, self._changed)
            self._enter("communicator")
            channel.send({"cmd": "NEW", "from": self._own_address, "communicator": uuid.uuid4().hex})
            await channel.inbox.get()
            channel.communicator = channel.generation
        self._enter("ack")
        channel.send(
            {
                "cmd": "PUT",
                "from": self._own_address,
                "request_id": item.request_id,
                "layer": item.layer,
                "tokens": item.tokens,
                "size": item.size,
            }
        )
        await channel.inbox.get()
        self._enter("data")
        if channel.generation != channel.communicator or not channel.connected:
            await asyncio.Event().wait()
        channel.send({"cmd": "DATA", "seed_part": item.seed_part, "padding": bytes(item.padding)})
        self.sent += 1
