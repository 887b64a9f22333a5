"""Decisions read from a byte string, so that whatever makes bytes (a seeded generator, libFuzzer) makes structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Source:
    """Reads ``data`` from its start; once it is used up, every decision is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that no decision has used."""
        return len(self._data) - self._at

    def byte(self) -> int:
        """0 to 255."""
        if self._at >= len(self._data):
            return 0
        self._at += 1
        return self._data[self._at - 1]

    def number(self, most: int) -> int:
        """0 to ``most``, both included."""
        value, span = 0, most
        while span:
            value = value << 8 | self.byte()
            span >>= 8
        return value % (most + 1)

    def pick(self, things: Sequence[T]) -> T:
        """One of ``things``."""
        return things[self.number(len(things) - 1)]

    def take(self, count: int) -> bytes:
        """Bytes as they are; fewer at the end."""
        piece = self._data[self._at : self._at + count]
        self._at += len(piece)
        return piece

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(self.left)

    def pieces(self, whole: bytes) -> list[bytes]:
        """``whole`` cut into pieces, often very small ones; they add up to it."""
        found, at = [], 0
        while at < len(whole):
            step = self.pick((len(whole), 1, 2, 3, 1 + self.byte(), 1 + self.number(len(whole) - 1)))
            found.append(whole[at : at + step])
            at += step
        return found
