"""Blocks between GPUs over NCCL, through vLLM's own wrapper (vllm/distributed/device_communicators/pynccl_wrapper.py).

One communicator of two ranks per connection: prefill is 0 and sends, decode is 1 and receives. The order of transfers
is that of the GO frames, so both sides agree without further words. Rows are gathered into one of a few staging
buffers on one stream and sent on another, so that copying the next piece overlaps the wire; the same in reverse on
decode. Nothing runs on the engine's own stream, which only leaves fences, and no step waits for a transfer.

A receive kernel occupies the GPU while it waits: decode starts it only when GO, or PART for each piece while prefill
still computes, says that it is computed.
A transfer that does not end in time, or whose peer's TCP connection breaks, is aborted (ncclCommAbort); the error says
how far it came.
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
from disagg_kv.transport.patience import wait_until
from disagg_kv.transport.pieces import Piece, cut

if TYPE_CHECKING:
    from disagg_kv.engine.layout import TorchCache

PREFILL, DECODE = 0, 1
_SLOWEST = 100e6
"""Bytes per second below which a transfer counts as stalled, whatever its size."""
_PRIORITY = -1
"""Streams of one priority are handed out in turn, also to the engine: a receive that waits on a stream that the engine
got too would hold up its steps. The engine uses none of this priority."""


def new_unique_id() -> bytes:
    """The 128 bytes by which two ranks find each other."""
    return bytes(bytearray(NCCLLibrary().ncclGetUniqueId().internal))


class NcclTransport:
    """See ``Transport``. ``channel`` is the control connection, which carries PART and shows whether the peer lives."""

    name = "nccl"
    computed_at = 0.0

    def __init__(
        self, cache: TorchCache, rank: int, unique_id: bytes, staging_bytes: int, slots: int, stall_seconds: float,
        channel: Channel,
    ) -> None:  # fmt: skip
        """Joins the communicator; blocks until the other side does too, about a second."""
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
            for number, piece in enumerate(self._pieces(len(blocks))):
                slot, total = number % len(self._slots), self._bytes(piece)
                cache.join(fence, piece.plane + piece.planes)
                self.computed_at = time.time()
                if parts:
                    self._channel.write(encode(Kind.PART, {}))
                with torch.cuda.stream(self._copy):
                    self._copy.wait_event(self._emptied[slot])
                    self._rows(piece, index, self._slots[slot], cache.gather)
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
            for number, piece in enumerate(self._pieces(count)):
                slot, total = number % len(self._slots), self._bytes(piece)
                if parts and (kind := self._channel.frame(patient=False)[0]) is not Kind.PART:
                    raise WireError(f"{kind.name} came instead of PART")
                self._wire.wait_event(self._emptied[slot])
                self._get(self._slots[slot], total)
                self._filled[slot].record(self._wire)
                with torch.cuda.stream(self._copy):
                    self._copy.wait_event(self._filled[slot])
                    if index is not None:
                        self._rows(piece, index, self._slots[slot], cache.scatter)
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

    def _pieces(self, blocks: int) -> list[Piece]:
        return list(cut(self._cache.planes, blocks, self._cache.row_bytes, self._staging))

    def _bytes(self, piece: Piece) -> int:
        return int(piece.planes * piece.blocks * self._cache.row_bytes)

    def _rows(self, piece: Piece, index: torch.Tensor, buffer: torch.Tensor, move: Callable[..., None]) -> None:
        size = piece.blocks * self._cache.row_bytes
        rows = index if piece.blocks == len(index) else index[piece.block : piece.block + piece.blocks]
        for plane in range(piece.planes):
            move(piece.plane + plane, rows, buffer[plane * size : (plane + 1) * size])

    def _put(self, buffer: torch.Tensor, total: int) -> None:
        self._nccl.ncclSend(buffer_type(buffer.data_ptr()), total, ncclDataTypeEnum.ncclUint8, DECODE, self._comm,
                            cudaStream_t(self._wire.cuda_stream))  # fmt: skip

    def _get(self, buffer: torch.Tensor, total: int) -> None:
        self._nccl.ncclRecv(buffer_type(buffer.data_ptr()), total, ncclDataTypeEnum.ncclUint8, PREFILL, self._comm,
                            cudaStream_t(self._wire.cuda_stream))  # fmt: skip

    def _first_exchange(self) -> None:
        """NCCL connects two ranks at their first transfer, and CUDA loads a kernel at its first use; done here, no
        request waits for it."""
        (self._put if self._rank == PREFILL else self._get)(self._slots[0], 8)
        self._join(self._wire, 1)
        with torch.inference_mode(), torch.cuda.stream(self._copy):
            self._cache.warm(self._slots[0], self._slots[1])
        self._join(self._copy, 1)

    def _join(self, stream: torch.cuda.Stream, blocks: int, fence: Any = None) -> None:
        """Returns when the stream is idle. Stalled when that takes too long or the peer is gone."""
        event = torch.cuda.Event()
        event.record(stream)
        limit = self._stall + blocks * self._cache.block_bytes / _SLOWEST
        wait_until(event.query, self._channel.broken, limit, lambda: f"{blocks} blocks, {self._state(fence)}")

    def _state(self, fence: Any) -> str:
        """What the GPU has not done yet, for the log. A slot is filled, then emptied: by the gathering and the wire on
        prefill, by the wire and the scattering on decode."""
        parts: list[tuple[str, Any]] = [("copies", self._copy), ("wire", self._wire)]
        parts += [(f"slot {number} filled", event) for number, event in enumerate(self._filled)]
        parts += [(f"slot {number} emptied", event) for number, event in enumerate(self._emptied)]
        if fence is not None:
            parts.append(("fence", fence))
        return "not done: " + (", ".join(name for name, part in parts if not part.query()) or "nothing")
