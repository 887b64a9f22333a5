"""Transport between GPUs over NCCL, through vLLM's wrapper (vllm/distributed/device_communicators/pynccl_wrapper.py).

One communicator of two ranks per connection: prefill is 0 and sends, decode is 1 and receives. Transfers are in the
order of the GO frames, so both sides agree without further messages. Rows are gathered into one of a few staging
buffers on one stream and sent on another, so that copying the next chunk overlaps sending; decode does the reverse.
Nothing runs on the engine's own stream, which only records events, and no step waits for a transfer.

A receive kernel occupies the GPU while it waits. Decode launches it only when GO says that the blocks are computed, or
PART for each chunk while prefill still computes. A transfer that does not end in time, or whose peer's TCP connection
breaks, is aborted (ncclCommAbort); the error tells how far it got.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.device_communicators.pynccl_wrapper import (
    NCCLLibrary,
    buffer_type,
    cudaStream_t,
    ncclDataTypeEnum,
)

from disagg_kv.protocol.frames import Kind, WireError, encode
from disagg_kv.transport.channel import Channel
from disagg_kv.transport.chunks import Chunk, split_into_chunks
from disagg_kv.transport.polling import wait_until

if TYPE_CHECKING:
    from disagg_kv.engine.layout import TorchCache

PREFILL, DECODE = 0, 1
_MIN_BYTES_PER_SECOND = 100e6
"""Bytes per second below which a transfer counts as stalled, whatever its size."""
_PRIORITY = -1
"""torch hands out the streams of one priority round-robin, also to the engine. A receive that waits on a stream which
the engine has too would block its steps. The engine uses none of this priority."""


def new_unique_id() -> bytes:
    """Return the 128 bytes by which two ranks find each other (ncclGetUniqueId)."""
    return bytes(bytearray(NCCLLibrary().ncclGetUniqueId().internal))


class NcclTransport:
    """See ``Transport``. ``channel`` is the control connection: it carries PART and shows whether the peer is
    connected."""

    name = "nccl"
    computed_at = 0.0

    def __init__(
        self, cache: TorchCache, rank: int, unique_id: bytes, staging_bytes: int, slots: int, stall_seconds: float,
        channel: Channel,
    ) -> None:  # fmt: skip
        """Create the communicator; blocks until the other side does too, about a second."""
        self._cache, self._rank, self._staging = cache, rank, staging_bytes
        self._stall, self._channel = stall_seconds, channel
        torch.cuda.set_device(cache.device)
        self._nccl = NCCLLibrary()
        self._wire = torch.cuda.Stream(cache.device, priority=_PRIORITY)
        self._copy = torch.cuda.Stream(cache.device, priority=_PRIORITY)
        self._slots = [cache.buffer(staging_bytes) for _ in range(slots)]
        self._filled = [torch.cuda.Event() for _ in range(slots)]
        self._emptied = [torch.cuda.Event() for _ in range(slots)]
        self._comm: Any = self._nccl.ncclCommInitRank(2, self._nccl.unique_id_from_bytes(unique_id), rank)
        try:
            self._first_exchange()
        except BaseException:
            self.close()
            raise

    def send(self, blocks: Sequence[int], fence: Any, parts: bool) -> None:
        cache = self._cache
        with torch.inference_mode():
            with torch.cuda.stream(self._copy):
                index = cache.index(blocks)
            for number, chunk in enumerate(self._chunks(len(blocks))):
                slot, total = number % len(self._slots), self._bytes(chunk)
                cache.join(fence, chunk.plane + chunk.planes)
                self.computed_at = time.time()
                if parts:
                    self._channel.write(encode(Kind.PART, {}))
                with torch.cuda.stream(self._copy):
                    self._copy.wait_event(self._emptied[slot])
                    self._rows(chunk, index, self._slots[slot], cache.gather)
                    self._filled[slot].record(self._copy)
                self._wire.wait_event(self._filled[slot])
                self._put(self._slots[slot], total)
                self._emptied[slot].record(self._wire)
            self._join(self._wire, len(blocks))

    def receive(self, blocks: Sequence[int] | None, count: int, fence: Any, parts: bool) -> None:
        cache = self._cache
        with torch.inference_mode():
            with torch.cuda.stream(self._copy):
                index = None if blocks is None else cache.index(blocks)
                cache.wait(fence)
            for number, chunk in enumerate(self._chunks(count)):
                slot, total = number % len(self._slots), self._bytes(chunk)
                if parts and (kind := self._channel.next_frame(may_idle=False)[0]) is not Kind.PART:
                    raise WireError(f"received {kind.name}, expected PART")
                self._wire.wait_event(self._emptied[slot])
                self._get(self._slots[slot], total)
                self._filled[slot].record(self._wire)
                with torch.cuda.stream(self._copy):
                    self._copy.wait_event(self._filled[slot])
                    if index is not None:
                        self._rows(chunk, index, self._slots[slot], cache.scatter)
                    self._emptied[slot].record(self._copy)
            self._join(self._copy, count, fence)

    def close(self) -> None:
        comm, self._comm = self._comm, None
        if comm is not None:
            abort = self._nccl.lib.ncclCommAbort
            abort.restype, abort.argtypes = ctypes.c_int, [ctypes.c_void_p]
            abort(comm)
            self._wire.synchronize()
            self._copy.synchronize()
            self._slots = []

    def _chunks(self, blocks: int) -> list[Chunk]:
        return list(split_into_chunks(self._cache.planes, blocks, self._cache.row_bytes, self._staging))

    def _bytes(self, chunk: Chunk) -> int:
        return int(chunk.planes * chunk.blocks * self._cache.row_bytes)

    def _rows(self, chunk: Chunk, index: torch.Tensor, buffer: torch.Tensor, move: Callable[..., None]) -> None:
        size = chunk.blocks * self._cache.row_bytes
        rows = index if chunk.blocks == len(index) else index[chunk.block : chunk.block + chunk.blocks]
        for plane in range(chunk.planes):
            move(chunk.plane + plane, rows, buffer[plane * size : (plane + 1) * size])

    def _put(self, buffer: torch.Tensor, total: int) -> None:
        self._nccl.ncclSend(buffer_type(buffer.data_ptr()), total, ncclDataTypeEnum.ncclUint8, DECODE, self._comm,
                            cudaStream_t(self._wire.cuda_stream))  # fmt: skip

    def _get(self, buffer: torch.Tensor, total: int) -> None:
        self._nccl.ncclRecv(buffer_type(buffer.data_ptr()), total, ncclDataTypeEnum.ncclUint8, PREFILL, self._comm,
                            cudaStream_t(self._wire.cuda_stream))  # fmt: skip

    def _first_exchange(self) -> None:
        """Make NCCL connect and CUDA load its kernels, which both do lazily, before the first request needs them."""
        (self._put if self._rank == PREFILL else self._get)(self._slots[0], 8)
        self._join(self._wire, 1)
        with torch.inference_mode(), torch.cuda.stream(self._copy):
            self._cache.warm(self._slots[0], self._slots[1])
        self._join(self._copy, 1)

    def _join(self, stream: torch.cuda.Stream, blocks: int, fence: Any = None) -> None:
        """Return when the stream is idle.

        Raises:
            Stalled: that takes too long, or the peer is gone.
        """
        event = torch.cuda.Event()
        event.record(stream)
        limit = self._stall + blocks * self._cache.block_bytes / _MIN_BYTES_PER_SECOND
        wait_until(event.query, self._channel.broken, limit, lambda: f"{blocks} blocks, {self._state(fence)}")

    def _state(self, fence: Any) -> str:
        """List what the GPU has not completed, for the log.

        A slot is filled, then emptied: by the gather and the send on prefill, by the receive and the scatter on
        decode.
        """
        parts: list[tuple[str, Any]] = [("copies", self._copy), ("wire", self._wire)]
        parts += [(f"slot {number} filled", event) for number, event in enumerate(self._filled)]
        parts += [(f"slot {number} emptied", event) for number, event in enumerate(self._emptied)]
        if fence is not None:
            parts.append(("fence", fence))
        return "not complete: " + (", ".join(name for name, part in parts if not part.query()) or "nothing")
