"""The interface of a transport and of the cache it moves blocks of.

A transport belongs to one connection and is used by one thread. After a failure (any exception) it is closed and the
connection with it; a new connection makes a new transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Stalled(ConnectionError):
    """The other side did not take part in a transfer in time."""


class BlockCache(Protocol):
    """The engine's KV cache as planes of rows; a row is what one block occupies in one plane."""

    planes: int
    row_bytes: int
    block_bytes: int
    num_blocks: int
    on_gpu: bool

    def join(self, fence: Any) -> None:
        """Returns once the fence is passed."""

    def index(self, blocks: Sequence[int]) -> Any:
        """The block ids as an index on the cache's device. IndexError for a block that does not exist."""

    def gather(self, plane: int, index: Any, out: Any) -> None:
        """Copies rows of a plane into ``out`` (bytes on the same device, one row after the other)."""

    def scatter(self, plane: int, index: Any, rows: Any) -> None:
        """Copies rows into a plane of the cache."""

    def buffer(self, size: int) -> Any:
        """Bytes on the cache's device."""


class Transport(Protocol):
    """Moves runs of blocks in the order in which both sides call it."""

    name: str

    def send(self, blocks: Sequence[int], fence: Any) -> None:
        """Returns when the blocks may be overwritten."""

    def receive(self, blocks: Sequence[int] | None, count: int, fence: Any) -> None:
        """Returns when ``count`` blocks are in the cache, or thrown away if ``blocks`` is None."""

    def close(self) -> None:
        """Frees what it has; also ends a transfer that hangs."""
