"""A cache in memory of this process that others can read by its addresses, and pairs of engines that do so."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from disagg_kv.transport.factory import set_up_ipc
from tests.kv.memory import Decode, MemoryCache, Prefill


class _Plane:
    """Rows of 8 bytes, ``stride`` bytes apart."""

    def __init__(self, num_blocks: int, stride: int) -> None:
        self.stride = stride
        self.memory = ctypes.create_string_buffer(num_blocks * stride)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.memory)

    def __getitem__(self, block: int) -> bytes:
        return ctypes.string_at(self.address + block * self.stride, 8)

    def __setitem__(self, block: int, row: bytes) -> None:
        ctypes.memmove(self.address + block * self.stride, row, 8)


class AddressCache(MemoryCache):
    """As ``MemoryCache``; the rows of the second plane are not adjacent."""

    def __init__(self, num_blocks: int = 64) -> None:
        self.num_blocks = num_blocks
        self.rows: Any = [_Plane(num_blocks, stride) for stride in (8, 24, 8)]

    def addresses(self) -> list[tuple[int, int]]:
        return [(plane.address, plane.stride) for plane in self.rows]


def ipc_prefill(make: Callable[..., Prefill], num_blocks: int = 64, **settings: Any) -> Prefill:
    one = make(cache=AddressCache(num_blocks), settings={"transport": "ipc", **settings})
    set_up_ipc(one.context, offers=True)
    return one


def ipc_decode(make: Callable[..., Decode], num_blocks: int = 64, **settings: Any) -> Decode:
    one = make(cache=AddressCache(num_blocks), settings={"transport": "ipc", **settings})
    set_up_ipc(one.context, offers=False)
    return one
