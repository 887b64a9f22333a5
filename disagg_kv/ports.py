"""Ports from a range: the first free block of consecutive ports, found by binding them.

A block is held while its :class:`PortBlock` is open. The sockets are bound and never listen, and SO_REUSEADDR is set
after bind. So another bind without SO_REUSEADDR fails, which is how other processes that choose from the same range
find the block taken, while a server that sets SO_REUSEADDR (``socket.create_server`` does) can listen on its ports.
A caller that chooses for a process which it starts keeps the block open until that process has ended.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType


class NoFreePorts(OSError):
    """No block of a range is free; the text names the setting."""


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports from ``first`` to ``last``, both included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> PortRange:
        """Read ``"21000-22999"``.

        Raises:
            ValueError: anything else.
        """
        first, dash, last = (part.strip() for part in text.partition("-"))
        numbers = [int(part) for part in (first, last) if part.isascii() and part.isdigit()]
        if not dash or len(numbers) != 2 or not 0 < numbers[0] <= numbers[1] < 65536:
            raise ValueError(f"{text!r} is no range of ports such as 21000-22999")
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def blocks(self, width: int) -> range:
        """First ports of the blocks of ``width`` ports, side by side, so that no block straddles two others."""
        return range(self.first, self.last - width + 2, width)


class PortBlock:
    """``width`` ports from ``first`` on, held until ``close``."""

    def __init__(self, first: int, width: int, held: ExitStack) -> None:
        self.first, self.width, self._held = first, width, held

    def close(self) -> None:
        """Give the ports back. May be repeated."""
        self._held.close()

    def __enter__(self) -> PortBlock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def free_block(
    ports: PortRange, width: int, bind: Callable[[int], AbstractContextManager[object]], setting: str
) -> PortBlock:
    """Take the first block of a range whose ports can all be bound.

    Args:
        bind: binds one port, and gives it back when its context ends.
        setting: the name of the setting that has the range, for errors.

    Raises:
        NoFreePorts: every block has a port that is taken, or the range is narrower than one block.
        OSError: a port cannot be bound for another reason, such as an address that this host does not have.
    """
    for first in ports.blocks(width):
        with ExitStack() as held:
            try:
                for port in range(first, first + width):
                    held.enter_context(bind(port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise OSError(error.errno, f"{setting} {ports}: port {port}: {error.strerror or error}") from None
                continue
            return PortBlock(first, width, held.pop_all())
    block = "free port" if width == 1 else f"{width} consecutive free ports"
    raise NoFreePorts(errno.EADDRINUSE, f"{setting} {ports}: no {block}; widen it or end what holds its ports")


def hold_block(ports: PortRange, width: int, host: str, setting: str) -> PortBlock:
    """Take the first free block at ``host``, an IP address. Errors as in :func:`free_block`."""

    def bind(port: int) -> socket.socket:
        one = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            one.bind((host, port))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        except BaseException:
            one.close()
            raise
        return one

    return free_block(ports, width, bind, setting)


def port_of_rank(
    ports: PortRange, ranks: int, rank: int, host: str, setting: str, from_first: Callable[[int], int]
) -> tuple[int, PortBlock | None]:
    """Choose the port of one of an engine's tensor parallel ranks. Rank 0 takes a block for all of them.

    Args:
        from_first: returns on every rank what rank 0 passed; called by all of them, unless there is only one.

    Returns:
        The port, and on rank 0 the block, to be kept open as long as the engine listens.

    Raises:
        OSError: as in :func:`free_block`, on rank 0.
    """
    block = hold_block(ports, ranks, host, setting) if rank == 0 else None
    first = block.first if block is not None else 0
    return (from_first(first) if ranks > 1 else first) + rank, block
