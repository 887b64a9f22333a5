"""CUDA IPC: prefill's allocations mapped into decode's process, and the copy out of them on decode's GPU.

CUDA documents no behaviour for reading memory whose owner has freed it. The driver counts references to an allocation,
so that a mapping stays valid when the owner's process ends (see docs/gpu-results.md); decode unmaps it as soon as the
connection ends, because the GPU memory is not free before.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from disagg_kv.protocol.frames import WireError
from disagg_kv.transport import cuda_driver
from disagg_kv.transport.chunks import split_into_chunks
from disagg_kv.transport.ipc import NONCE_BYTES, check_nonce, read_nonce, read_num_blocks, read_planes
from disagg_kv.transport.polling import wait_until

if TYPE_CHECKING:
    from disagg_kv.engine.layout import TorchCache

KIND = "cuda"
_MAX_REGIONS = 320
"""Their handles must fit into READY. vLLM has one allocation for the cache, or one for each layer."""
_PRIORITY = -1
"""As in ``nccl``: the engine uses no stream of this priority."""


class CannotShare(Exception):
    """This engine's cache cannot be mapped by other processes; the text is the reason."""


class ExportedCudaMemory:
    """Prefill's side: handles of the allocations that contain the cache."""

    def __init__(self, cache: TorchCache) -> None:
        """Create the handles.

        Raises:
            CannotShare: the cache is not in memory of ``cudaMalloc``.
        """
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._probe = torch.tensor(list(self._nonce), dtype=torch.uint8).to(cache.device)
        torch.cuda.synchronize(cache.device)
        self._blocks = cache.num_blocks
        self._regions: dict[int, tuple[int, list[Any]]] = {}
        try:
            self._planes = [[*self._find(address), stride] for address, stride in cache.addresses()]
            self._probe_at = self._find(self._probe.data_ptr())
        except cuda_driver.CudaError as error:
            raise CannotShare(str(error)) from error
        if len(self._regions) > _MAX_REGIONS:
            raise CannotShare(f"the cache has {len(self._regions)} allocations, more than {_MAX_REGIONS}")

    def describe(self) -> dict[str, Any]:
        """Fields of READY."""
        return {"kind": KIND, "regions": [region for _, region in self._regions.values()], "planes": self._planes,
                "blocks": self._blocks, "nonce": self._nonce.hex(), "probe": list(self._probe_at)}  # fmt: skip

    def _find(self, address: int) -> tuple[int, int]:
        """Return number of the allocation and offset in it."""
        base, size = cuda_driver.allocation_of(address)
        if base not in self._regions:
            if not cuda_driver.can_share(address):
                raise CannotShare("the KV cache is not in memory of cudaMalloc (expandable segments or sleep mode)")
            self._regions[base] = (len(self._regions), [cuda_driver.share(base).hex(), size])
        return self._regions[base][0], address - base


class CudaMemoryReader:
    """See ``MemoryReader``. Rows of one plane are gathered into decode's blocks, by way of a scratch buffer where these
    are not adjacent."""

    def __init__(self, cache: TorchCache, memory: dict[str, Any], scratch_bytes: int) -> None:
        """Map the memory that READY describes. The first time takes about 0.1 s.

        Raises:
            WireError: malformed fields.
            CudaError, ConnectionError: it cannot be mapped.
        """
        named, probe = memory.get("regions"), memory.get("probe")
        if not isinstance(named, list) or not 0 < len(named) <= _MAX_REGIONS:
            raise WireError("the handles of prefill's memory are missing")
        planes, blocks = read_planes(memory, cache.planes, len(named)), read_num_blocks(memory)
        nonce = read_nonce(memory)
        if not isinstance(probe, list) or len(probe) != 2 or not all(type(one) is int and one >= 0 for one in probe):
            raise WireError("the probe of prefill's memory is invalid")
        self._cache, self._scratch_bytes = cache, scratch_bytes
        self._mapped: list[int] = []
        self._planes: list[torch.Tensor] = []
        torch.cuda.set_device(cache.device)
        cuda_driver.use_device(cache.device.index or 0)
        self._stream = torch.cuda.Stream(cache.device, priority=_PRIORITY)
        self._scratch = cache.buffer(scratch_bytes)
        try:
            regions = [self._map(region) for region in named]
            if probe[0] >= len(regions) or probe[1] + NONCE_BYTES > len(regions[probe[0]]):
                raise WireError("the probe of prefill's memory is out of range")
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                check_nonce(bytes(regions[probe[0]][probe[1] : probe[1] + NONCE_BYTES].tolist()), nonce)
                for region, offset, stride in planes:
                    if offset + (blocks - 1) * stride + cache.row_bytes > len(regions[region]):
                        raise WireError("a plane of prefill's cache is outside its memory")
                self._planes = [cache.rows_in(regions[region], offset, stride, blocks)
                                for region, offset, stride in planes]  # fmt: skip
                half = scratch_bytes // 2
                cache.warm(self._scratch[:half], self._scratch[half:])
            self._stream.synchronize()
        except BaseException:
            self.close()
            raise

    def read(self, source: Sequence[int], target: Sequence[int], fence: Any, seconds: float) -> None:
        cache, size = self._cache, self._cache.row_bytes
        adjacent = list(target) == list(range(target[0], target[0] + len(target)))
        done = torch.cuda.Event()
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            there = torch.tensor(list(source), dtype=torch.int64).to(cache.device)
            here = cache.index(target)
            cache.wait(fence)
            for chunk in split_into_chunks(cache.planes, len(source), size, self._scratch_bytes):
                place = slice(chunk.block, chunk.block + chunk.blocks)
                rows = self._scratch[: chunk.blocks * size]
                for plane in range(chunk.plane, chunk.plane + chunk.planes):
                    source_rows = self._planes[plane]
                    if adjacent and cache.take_into(source_rows, there[place], plane, target[chunk.block]):
                        continue
                    cache.take(source_rows, there[place], rows)
                    cache.scatter(plane, here[place], rows)
            done.record(self._stream)
        try:
            wait_until(done.query, lambda: False, seconds, lambda: f"{len(source)} blocks")
        finally:
            self._stream.synchronize()

    def close(self) -> None:
        mapped, self._mapped, self._planes = self._mapped, [], []
        # Errors are those of an earlier copy, which the engine's own thread gets too.
        with contextlib.suppress(RuntimeError):
            self._stream.synchronize()
        for address in mapped:
            with contextlib.suppress(cuda_driver.CudaError):
                cuda_driver.close_handle(address)

    def _map(self, region: Any) -> torch.Tensor:
        """Map one allocation, given as [handle, bytes], and return its bytes."""
        try:
            handle, size = region
            raw = bytes.fromhex(handle)
        except (TypeError, ValueError):
            raise WireError("a handle of prefill's memory is invalid") from None
        if len(raw) != cuda_driver.HANDLE_BYTES or type(size) is not int or not 0 < size < 1 << 48:
            raise WireError("a handle of prefill's memory has a wrong length")
        address = cuda_driver.open_handle(raw)
        self._mapped.append(address)
        storage = torch._C._construct_storage_from_data_pointer(address, self._cache.device, size)
        return torch.empty(0, dtype=torch.uint8, device=self._cache.device).set_(storage)
