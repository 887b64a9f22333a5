"""Transport over the control connection, through host memory: for CPU engines, and where NCCL cannot be used.

The bytes follow the GO frame. A cache on a GPU is copied through a pinned buffer on a separate stream.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from disagg_kv.transport.channel import Channel
from disagg_kv.transport.chunks import split_into_chunks

if TYPE_CHECKING:
    from disagg_kv.engine.layout import TorchCache


class TcpTransport:
    """See ``Transport``. ``staging_bytes`` is the size that both sides agreed on."""

    name = "tcp"
    computed_at = 0.0

    def __init__(self, channel: Channel, cache: TorchCache, staging_bytes: int) -> None:
        self._channel, self._cache, self._staging = channel, cache, staging_bytes
        self._host: torch.Tensor | None = None
        self._device: torch.Tensor | None = None
        self._stream: Any = None

    def send(self, blocks: Sequence[int], fence: Any, parts: bool) -> None:
        cache, host = self._cache, self._buffers()
        with torch.inference_mode(), cache.on_stream(self._stream):
            index = cache.index(blocks)
            for chunk in split_into_chunks(cache.planes, len(blocks), cache.row_bytes, self._staging):
                cache.join(fence, chunk.plane + chunk.planes)
                self.computed_at = time.time()
                size = chunk.blocks * cache.row_bytes
                rows = index[chunk.block : chunk.block + chunk.blocks]
                target = host if self._device is None else self._device
                for plane in range(chunk.planes):
                    cache.gather(chunk.plane + plane, rows, target[plane * size : (plane + 1) * size])
                total = chunk.planes * size
                if self._device is not None:
                    host[:total].copy_(self._device[:total], non_blocking=True)
                    cache.synchronize()
                self._channel.write(memoryview(host[:total].numpy()))

    def receive(self, blocks: Sequence[int] | None, count: int, fence: Any, parts: bool) -> None:
        cache, host = self._cache, self._buffers()
        with torch.inference_mode(), cache.on_stream(self._stream):
            index = None if blocks is None else cache.index(blocks)
            cache.wait(fence)
            for chunk in split_into_chunks(cache.planes, count, cache.row_bytes, self._staging):
                size = chunk.blocks * cache.row_bytes
                total = chunk.planes * size
                self._channel.read_into(memoryview(host[:total].numpy()))
                if index is None:
                    continue
                rows = index[chunk.block : chunk.block + chunk.blocks]
                source = host
                if self._device is not None:
                    self._device[:total].copy_(host[:total], non_blocking=True)
                    source = self._device
                for plane in range(chunk.planes):
                    cache.scatter(chunk.plane + plane, rows, source[plane * size : (plane + 1) * size])
                cache.synchronize()

    def close(self) -> None:
        self._host = self._device = None

    def _buffers(self) -> torch.Tensor:
        if self._host is None:
            self._host = torch.empty(self._staging, dtype=torch.uint8, pin_memory=self._cache.on_gpu)
            if self._cache.on_gpu:
                self._device = self._cache.buffer(self._staging)
                self._stream = self._cache.new_stream()
        return self._host
