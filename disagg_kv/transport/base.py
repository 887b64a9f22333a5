"""Interfaces of a transport and of the KV cache whose blocks it moves.

A transport belongs to one connection and is used by one thread. After any exception it is closed together with the
connection; a new connection creates a new transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Stalled(ConnectionError):
    """The peer made no progress in a transfer within the limit, or is gone."""


class BlockCache(Protocol):
    """The engine's KV cache as planes of rows. A row is what one block occupies in one plane."""

    planes: int
    row_bytes: int
    block_bytes: int
    num_blocks: int
    on_gpu: bool

    def layered(self, fence: Any) -> bool:
        """Whether the fence is passed plane by plane and not yet for all planes."""

    def join(self, fence: Any, planes: int) -> None:
        """Wait until the first ``planes`` planes of the blocks behind this fence may be read."""

    def index(self, blocks: Sequence[int]) -> Any:
        """Put block ids into an index on the cache's device.

        Raises:
            IndexError: a block does not exist.
        """

    def gather(self, plane: int, index: Any, out: Any) -> None:
        """Copy rows of a plane into ``out``: bytes on the same device, row after row."""

    def scatter(self, plane: int, index: Any, rows: Any) -> None:
        """Copy rows into a plane of the cache."""

    def addresses(self) -> list[tuple[int, int]]:
        """Return address of row 0 and distance of two rows, in bytes, of each plane."""

    def buffer(self, size: int) -> Any:
        """Allocate ``size`` bytes on the cache's device."""


class Transport(Protocol):
    """Moves runs of blocks in the order in which both sides call it."""

    name: str
    computed_at: float
    """Wall clock time at which the blocks of the last ``send`` were all computed, for the trace."""

    def send(self, blocks: Sequence[int], fence: Any, parts: bool) -> None:
        """Send blocks; returns when they may be overwritten.

        Args:
            fence: as for ``BlockCache.join``.
            parts: not all planes are computed yet, and both sides know it (``Go.parts``).
        """

    def receive(self, blocks: Sequence[int] | None, count: int, fence: Any, parts: bool) -> None:
        """Receive ``count`` blocks; returns when they are in the cache.

        Args:
            blocks: where to put them; None to discard them.
            fence: event after which the blocks may be written, or None.
        """

    def close(self) -> None:
        """Free the buffers; also aborts a transfer that hangs."""
