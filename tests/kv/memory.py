"""Two halves of the connector without vLLM and torch: caches of bytes, and helpers to wait for what threads do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from disagg_kv.decode.peer_connection import PeerConnections
from disagg_kv.decode.pending_loads import Collected, Load, PendingLoads
from disagg_kv.prefill.send_queue import SendQueue
from disagg_kv.prefill.server import Server
from disagg_kv.protocol.handshake import Identity, Shape
from disagg_kv.protocol.keys import Key, fingerprint
from disagg_kv.settings import Settings
from disagg_kv.trace import Trace
from disagg_kv.transport.channel import Channel
from disagg_kv.transport.chunks import split_into_chunks
from disagg_kv.transport.factory import RankContext

SHAPE = Shape(model="m", dtype="float32", block_size=4, layout="(B*1,4)", planes=3, block_bytes=24, tp=1)


class MemoryCache:
    """Three planes of rows of 8 bytes. ``fence`` objects are callables that return when they are passed."""

    planes, row_bytes, block_bytes, on_gpu = 3, 8, 24, False

    def __init__(self, num_blocks: int = 64) -> None:
        self.num_blocks = num_blocks
        self.rows = [[bytes(8)] * num_blocks for _ in range(self.planes)]

    def fill(self, blocks: Sequence[int], seed: int) -> None:
        for plane in range(self.planes):
            for place, block in enumerate(blocks):
                self.rows[plane][block] = f"{seed % 100:02}{plane}{place:05}".encode()

    def content(self, blocks: Sequence[int]) -> list[list[bytes]]:
        return [[self.rows[plane][block] for block in blocks] for plane in range(self.planes)]

    def layered(self, fence: Any) -> bool:
        return False

    def join(self, fence: Any, planes: int) -> None:
        if fence is not None:
            fence()

    def index(self, blocks: Sequence[int]) -> Any:
        return list(blocks)

    def gather(self, plane: int, index: Any, out: Any) -> None:
        raise NotImplementedError

    def scatter(self, plane: int, index: Any, rows: Any) -> None:
        raise NotImplementedError

    def buffer(self, size: int) -> Any:
        return bytearray(size)


class MemoryTransport:
    """Pieces of at most 64 bytes over the control connection."""

    name = "tcp"
    computed_at = 0.0

    def __init__(self, cache: MemoryCache, channel: Channel) -> None:
        self._cache, self._channel = cache, channel

    def send(self, blocks: Sequence[int], fence: Any, parts: bool) -> None:
        for chunk in split_into_chunks(self._cache.planes, len(blocks), 8, 64):
            for plane in range(chunk.plane, chunk.plane + chunk.planes):
                for block in blocks[chunk.block : chunk.block + chunk.blocks]:
                    self._channel.write(self._cache.rows[plane][block])

    def receive(self, blocks: Sequence[int] | None, count: int, fence: Any, parts: bool) -> None:
        for chunk in split_into_chunks(self._cache.planes, count, 8, 64):
            for plane in range(chunk.plane, chunk.plane + chunk.planes):
                for place in range(chunk.block, chunk.block + chunk.blocks):
                    row = bytearray(8)
                    self._channel.read_into(memoryview(row))
                    if blocks is not None:
                        self._cache.rows[plane][blocks[place]] = bytes(row)

    def close(self) -> None:
        pass


def context(role: str, cache: MemoryCache, shape: Shape | None = SHAPE, rank: int = 0, **settings: Any) -> RankContext:
    def transport_factory(context: RankContext, channel: Channel, ready: Mapping[str, Any]) -> MemoryTransport:
        return MemoryTransport(cache, channel)

    return RankContext(
        Identity(role, f"boot-{role}", rank, shape), Settings(**settings), cache, Trace(""), transport_factory
    )


@dataclass
class Prefill:
    """A prefill engine's port and send_queue."""

    cache: MemoryCache = field(default_factory=MemoryCache)
    settings: dict[str, Any] = field(default_factory=dict)
    shape: Shape = SHAPE
    port: int = 0

    def __post_init__(self) -> None:
        self.send_queue = SendQueue(hold_seconds=60)
        self.context = context("prefill", self.cache, self.shape, **self.settings)
        self.server = Server(self.context, self.send_queue, self.port)
        self.address = f"127.0.0.1:{self.server.port}"

    def compute(
        self, key: Key, blocks: Sequence[int], seed: int = 1, request: str = "", adapter: str = ""
    ) -> None:  # fmt: skip
        """A prompt that is computed and finished at once."""
        self.cache.fill(blocks, seed)
        self.send_queue.open(key, request or key.transfer, len(blocks), adapter)
        self.send_queue.progress(request or key.transfer, blocks, len(blocks), None)


@dataclass
class Decode:
    """A decode engine's pending and connections."""

    cache: MemoryCache = field(default_factory=MemoryCache)
    settings: dict[str, Any] = field(default_factory=dict)
    shape: Shape = SHAPE

    def __post_init__(self) -> None:
        self.pending = PendingLoads()
        self.context = here = context("decode", self.cache, self.shape, **self.settings)
        self.connections = PeerConnections(here, self.pending)
        self.server = Server(here, SendQueue(hold_seconds=60), 0, self.pending.release, self.connections.connect)
        self.address = f"127.0.0.1:{self.server.port}"

    def close(self) -> None:
        self.connections.close()
        self.server.close()

    def load(
        self, key: Key, address: str, blocks: Sequence[int], first: int = 0, seconds: float = 30, adapter: str = ""
    ) -> None:  # fmt: skip
        load = Load(key, f"d-{key.transfer}", blocks, first, time.monotonic() + seconds, adapter=adapter)
        self.connections.start(load, address)

    def result(self, count: int = 1) -> Collected:
        """What ``collect`` says once ``count`` loads are over."""
        requests: set[str] = set()
        failed: set[int] = set()
        reasons: list[str] = []
        until(lambda: self._take(requests, failed, reasons) >= count, lambda: self.pending.wait(0.05))
        return Collected(frozenset(requests), frozenset(failed), tuple(reasons))

    def _take(self, requests: set[str], failed: set[int], reasons: list[str]) -> int:
        news = self.pending.collect()
        self.connections.give_up(news.unwanted)
        requests |= news.requests
        failed |= news.failed_blocks
        reasons += news.reasons
        return len(requests)


def key(transfer: str, prompt: int = 0) -> Key:
    return Key(transfer, fingerprint([prompt]))


def until(condition: Callable[[], bool], wait: Callable[[], None]) -> None:
    """Waits for a condition with a wait that ends when something changes."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        wait()
