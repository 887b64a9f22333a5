"""Memory for received KV on a decode engine: a buffer of limited size, then a pinned pool; without either it fails.

Mirrors vLLM 0.21 ``p2p_nccl_engine.py`` (recv_store, buffer_size) and ``tensor_memory_pool.py`` (buddy blocks),
including their leaks: KV that is dropped before it was loaded is never taken off the buffer's count, and
a tensor that arrives a second time replaces the first without giving its memory back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_SMALLEST_BLOCK = 512


class InsufficientMemory(ValueError):
    """The pool has no block left. vLLM's listener thread does not catch it."""


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class BuddyPool:
    """Buddy allocator: blocks in powers of two out of one memory region; addresses only, no bytes."""

    def __init__(self, size: int) -> None:
        self.size = _power_of_two(max(size, _SMALLEST_BLOCK))
        self._free: dict[int, set[int]] = {self.size: {0}}
        self._taken: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Bytes handed out, rounded up to full blocks."""
        return sum(self._taken.values())

    def allocate(self, size: int) -> int:
        """Take a block of at least ``size`` bytes and return its address.

        Raises:
            InsufficientMemory: when no block is large enough.
        """
        wanted = _power_of_two(max(size, _SMALLEST_BLOCK))
        block = wanted
        while not self._free.get(block):
            block *= 2
            if block > self.size:
                raise InsufficientMemory("Insufficient memory")
        address = self._free[block].pop()
        while block > wanted:
            block //= 2
            self._free.setdefault(block, set()).add(address + block)
        self._taken[address] = wanted
        return address

    def free(self, address: int) -> None:
        """Give a block back and join it with its free neighbours."""
        block = self._taken.pop(address)
        while block < self.size:
            buddy = address ^ block
            free = self._free.setdefault(block, set())
            if buddy not in free:
                break
            free.remove(buddy)
            address = min(address, buddy)
            block *= 2
        self._free.setdefault(block, set()).add(address)


@dataclass(frozen=True)
class KvTensor:
    """One layer's KV of one request: a part of the seed, and the number of tokens it was computed from."""

    seed_part: bytes
    tokens: int
    size: int
    pool_address: int | None = None


class ReceiveStore:
    """KV by request id and layer, until the request that it belongs to has finished here.

    Args:
        changed: called after every change that a waiting step loop or a test may care about.
    """

    def __init__(self, buffer_bytes: int, pool_bytes: int, layers: int, changed: Callable[[], None]) -> None:
        self.buffer_limit = buffer_bytes
        self.buffer_used = 0
        self.pool = BuddyPool(pool_bytes)
        self.layers = layers
        self._tensors: dict[str, dict[int, KvTensor]] = {}
        self._loaded: set[str] = set()
        self._changed = changed

    def put(self, request_id: str, layer: int, tensor: KvTensor) -> None:
        """Store one received tensor.

        Raises:
            InsufficientMemory: when neither the buffer nor the pool has room; the tensor is lost.
        """
        if self.buffer_used + tensor.size > self.buffer_limit:
            address = self.pool.allocate(tensor.size)
            tensor = KvTensor(tensor.seed_part, tensor.tokens, tensor.size, address)
        else:
            self.buffer_used += tensor.size
        self._tensors.setdefault(request_id, {})[layer] = tensor
        self._changed()

    def has(self, request_id: str, layer: int) -> bool:
        """True when ``load`` would find the tensor."""
        return layer in self._tensors.get(request_id, ())

    def load(self, request_id: str, layer: int) -> KvTensor:
        """Copy one tensor into the engine's own cache: it leaves the buffer's count, but stays stored."""
        tensor = self._tensors[request_id][layer]
        if tensor.pool_address is None:
            self.buffer_used -= tensor.size
        self._loaded.add(request_id)
        self._changed()
        return tensor

    def release(self, request_id: str) -> None:
        """Forget a finished or aborted request's KV and give the pool its blocks back."""
        self._loaded.discard(request_id)
        for tensor in self._tensors.pop(request_id, {}).values():
            if tensor.pool_address is not None:
                self.pool.free(tensor.pool_address)
        self._changed()

    def waiting(self) -> dict[str, int]:
        """Bytes of KV that no request has loaded, by request id: their decode is still to come, or they are orphans."""
        return {
            request_id: sum(tensor.size for tensor in tensors.values())
            for request_id, tensors in self._tensors.items()
            if request_id not in self._loaded
        }
