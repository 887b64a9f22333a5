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

    def layered(self, fence: Any) -> bool:
        """Whether the fence is passed plane by plane, and not yet altogether."""

    def join(self, fence: Any, planes: int) -> None:
        """Returns once the first ``planes`` planes of the blocks behind this fence may be read."""

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
    computed_at: float
    """Wall clock time at which the blocks of the last ``send`` were all computed, for the trace."""

    def send(self, blocks: Sequence[int], fence: Any, parts: bool) -> None:
        """Returns when the blocks may be overwritten. ``fence`` as for ``BlockCache.join``; ``parts``: not all planes
        are computed yet, and both sides know it."""

    def receive(self, blocks: Sequence[int] | None, count: int, fence: Any, parts: bool) -> None:
        """Returns when ``count`` blocks are in the cache, or thrown away if ``blocks`` is None. ``fence``: a mark
        behind which the blocks may be written."""

    def close(self) -> None:
        """Frees what it has; also ends a transfer that hangs."""
