"""One process's published numbers: the newest whole text of one writer, for any number of readers.

Two halves in turns. The writer fills the half that is not being read and then turns one word; a writer that is stopped
or killed in the middle leaves the half before as it was. A reader that was overtaken twice sees so and reads again.
"""

from __future__ import annotations

import zlib

HALF = 256 * 1024
_HEAD = 64
_TRIES = 8

SIZE = _HEAD + 2 * HALF
"""Bytes of an area."""


class SnapshotSlot:
    """``memory`` has :data:`SIZE` bytes, zero at first."""

    def __init__(self, memory: memoryview) -> None:
        self._head = memory[:_HEAD].cast("q")
        self._halves = [memory[_HEAD + i * HALF : _HEAD + (i + 1) * HALF] for i in (0, 1)]

    def write(self, text: bytes) -> None:
        """Publish ``text``.

        Raises:
            ValueError: it is too long.
        """
        if len(text) > HALF:
            raise ValueError(f"{len(text)} bytes do not fit into {HALF}")
        generation = self._head[0] + 1
        which = generation & 1
        self._halves[which][: len(text)] = text
        self._head[2 + 2 * which] = len(text)
        self._head[3 + 2 * which] = zlib.crc32(text)
        self._head[0] = generation

    def read(self) -> bytes:
        """What was published last; empty when nothing was, or when it cannot be read now."""
        for _ in range(_TRIES):
            generation = self._head[0]
            if not generation:
                return b""
            which = generation & 1
            length = self._head[2 + 2 * which]
            if not 0 <= length <= HALF:
                continue
            text = bytes(self._halves[which][:length])
            if zlib.crc32(text) == self._head[3 + 2 * which]:
                return text
        return b""
