"""Pings that announce an engine to the proxy, as ``P2pNcclEngine.ping`` sends them: one message every three seconds.

The socket is a ZMQ DEALER whose identity is the KV address. ZMQ queues pings while the proxy is down and delivers them
together later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack
import zmq

from disagg_sim.config import SimConfig


class Pinger:
    """Pings until stopped.

    Args:
        more: returns the fields that the connector adds to the message, anew for each one.
        power: reports of the engine's GPUs; None for an engine without.

    Attributes:
        sent: messages handed to ZMQ.
    """

    def __init__(
        self,
        config: SimConfig,
        http_address: str,
        kv_address: str,
        more: Callable[[], Mapping[str, Any] | None],
        enabled: Callable[[], bool],
        changed: Callable[[], None],
        power: Callable[[], Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        self._config = config
        self._enabled = enabled
        self._changed = changed
        self._identity = kv_address.encode()
        self._http_address, self._kv_address = http_address, kv_address
        self._more, self._power = more, power
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._task: asyncio.Task[None] | None = None
        self.sent = 0

    def start(self) -> None:
        """Send the first ping now. Does nothing without a proxy."""
        if self._config.proxy is not None:
            self._context = zmq.Context()
            sockets = [self._connected(self._context, proxy) for proxy in self._config.proxy.split(",")]
            self._task = asyncio.create_task(self._run(sockets), name="ping")

    def _connected(self, context: zmq.Context[zmq.Socket[bytes]], proxy: str) -> zmq.Socket[bytes]:
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.IDENTITY, self._identity)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.IPV6, "[" in proxy)
        sock.connect(f"tcp://{proxy}")
        return sock

    async def stop(self) -> None:
        """End at once; nothing that is queued goes out. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._context is not None:
            context, self._context = self._context, None
            context.destroy(linger=0)

    def fields(self) -> dict[str, Any]:
        """The fields of a message."""
        return {
            "type": "P" if self._config.is_producer else "D",
            "http_address": self._http_address,
            "zmq_address": self._kv_address,
            **(self._more() or {}),
            **({} if self._power is None else {"power": list(self._power())}),
        }

    async def _run(self, sockets: Sequence[zmq.Socket[bytes]]) -> None:
        while True:
            for sock in sockets if self._enabled() else ():
                try:
                    sock.send(msgpack.packb(self.fields()), zmq.NOBLOCK)
                    self.sent += 1
                    self._changed()
                except zmq.Again:
                    pass  # the queue is full; vLLM's thread would wait here
            await asyncio.sleep(self._config.ping_seconds)
