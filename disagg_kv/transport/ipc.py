"""Transport between processes of one host: decode copies blocks straight out of prefill's KV cache.

After GO, prefill writes the ids of its blocks (4 bytes each, little endian). Decode copies them into its own blocks,
sends DONE once the copy is complete, and uses them after prefill's CONFIRM. Nothing runs on prefill's GPU.

- Decode reads no unfinished block: prefill sends the ids after the step that computes the blocks is complete.
- Prefill reuses no block that is read: it waits for DONE. If the connection ends before, prefill frees the blocks at
  once, although the copy of a killed or cancelled reader may still run: it reads other data then, but uses none of it,
  because CONFIRM never comes.
- Decode uses nothing of a dead prefill: CONFIRM comes from a live process after the copy was complete, so the memory
  belonged to that process all the time. The end of the connection alone would not tell, since the kernel may free the
  memory of a killed process before it closes its sockets.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

from disagg_kv.protocol.frames import Kind, WireError, encode
from disagg_kv.transport.base import BlockCache, Stalled
from disagg_kv.transport.channel import Channel

DONE, CONFIRM = encode(Kind.DONE, {}), encode(Kind.CONFIRM, {})
_ID_BYTES = 4
_MIN_BYTES_PER_SECOND = 100e6
"""Bytes per second below which a copy counts as stalled, whatever its size."""
_MAX_BLOCKS, _MAX_PLANES, _MAX_OFFSET = 1 << 24, 4096, 1 << 62


class MemoryReader(Protocol):
    """Decode's access to the cache of one prefill process."""

    def read(self, source: Sequence[int], target: Sequence[int], fence: Any, seconds: float) -> None:
        """Copy prefill's blocks ``source`` into the blocks ``target`` of this cache.

        Returns or raises only when nothing writes to ``target`` any more.

        Args:
            fence: event after which ``target`` may be written, or None.
            seconds: limit of the copy.

        Raises:
            OSError, RuntimeError: the memory cannot be read.
            Stalled: the copy took longer than ``seconds``.
        """

    def close(self) -> None:
        """End the access; waits for a copy that runs."""


class IpcTransport:
    """See ``Transport``. ``reader`` and ``num_blocks`` (of prefill's cache) are decode's; None and 0 on prefill."""

    name = "ipc"
    computed_at = 0.0

    def __init__(
        self, channel: Channel, cache: BlockCache, stall_seconds: float, reader: MemoryReader | None = None,
        num_blocks: int = 0,
    ) -> None:  # fmt: skip
        self._channel, self._cache, self._stall = channel, cache, stall_seconds
        self._reader, self._num_blocks = reader, num_blocks

    def send(self, blocks: Sequence[int], fence: Any, parts: bool) -> None:
        self._cache.join(fence, self._cache.planes)
        self.computed_at = time.time()
        self._channel.expect_acknowledgement()
        self._channel.write(encode_ids(blocks))
        self._channel.wait_acknowledged(self._limit(len(blocks)))
        self._channel.write(CONFIRM)

    def receive(self, blocks: Sequence[int] | None, count: int, fence: Any, parts: bool) -> None:
        raw = bytearray(_ID_BYTES * count)
        self._channel.read_into(memoryview(raw))
        source = decode_ids(raw)
        if source and max(source) >= self._num_blocks:
            raise WireError(f"block {max(source)} of a cache of {self._num_blocks} blocks")
        if blocks is not None:
            assert self._reader is not None
            self._reader.read(source, blocks, fence, self._limit(count))
        with self._channel.write_lock:
            self._channel.write(DONE)
        kind, _ = self._channel.next_frame(may_idle=False)
        if kind is not Kind.CONFIRM:
            raise WireError(f"received {kind.name}, expected CONFIRM")

    def close(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def _limit(self, blocks: int) -> float:
        return self._stall + blocks * self._cache.block_bytes / _MIN_BYTES_PER_SECOND


def encode_ids(blocks: Sequence[int]) -> bytes:
    ids = array("I", blocks)
    assert ids.itemsize == _ID_BYTES
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def decode_ids(raw: bytes | bytearray) -> array[int]:
    ids = array("I")
    ids.frombytes(raw)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def read_planes(memory: dict[str, Any], planes: int, regions: int) -> list[tuple[int, int, int]]:
    """Check the fields of prefill's memory in READY and return (region, offset, stride) of each plane, in bytes.

    Args:
        planes: of this side's cache; the handshake has compared it.
        regions: number of memory regions that READY names.

    Raises:
        WireError: malformed.
    """
    listed = memory.get("planes")
    if not isinstance(listed, list) or len(listed) != planes or planes > _MAX_PLANES:
        raise WireError("the planes of prefill's cache are missing or invalid")
    found = []
    for plane in listed:
        if not isinstance(plane, list) or len(plane) != 3 or not all(type(one) is int for one in plane):
            raise WireError("a plane of prefill's cache is invalid")
        region, offset, stride = plane
        if not 0 <= region < regions or not 0 <= offset < _MAX_OFFSET or not 0 < stride < _MAX_OFFSET:
            raise WireError("a plane of prefill's cache is out of range")
        found.append((region, offset, stride))
    return found


def read_num_blocks(memory: dict[str, Any]) -> int:
    """Return the number of blocks of prefill's cache.

    Raises:
        WireError: missing or out of range.
    """
    blocks = memory.get("blocks")
    if type(blocks) is not int or not 0 < blocks <= _MAX_BLOCKS:
        raise WireError("the number of blocks of prefill's cache is missing or invalid")
    return blocks


def read_nonce(memory: dict[str, Any]) -> bytes:
    """Return the nonce that lies in prefill's memory, by which decode recognises it.

    Raises:
        WireError: missing or malformed.
    """
    try:
        nonce = bytes.fromhex(memory["nonce"])
    except (KeyError, TypeError, ValueError):
        raise WireError("the nonce of prefill's memory is missing") from None
    if len(nonce) != NONCE_BYTES:
        raise WireError("the nonce of prefill's memory has a wrong length")
    return nonce


NONCE_BYTES = 16


def check_nonce(found: bytes, wanted: bytes) -> None:
    """Check that the memory that was opened is prefill's.

    Raises:
        ConnectionError: it is not: another process id namespace, for example.
    """
    if found != wanted:
        raise ConnectionError("this is not the prefill engine's memory (another container?)")


__all__ = ["CONFIRM", "DONE", "IpcTransport", "MemoryReader", "Stalled"]
