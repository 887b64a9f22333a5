"""A chunk of a chunked body that came whole and alone, as a token of a stream mostly does (RFC 9112, 7.1).

Only the form in which vLLM's server writes it counts: lower-case digits, no extensions (uvicorn 0.20 - 0.54,
``protocols/http/httptools_impl.py``, ``send``). Everything else is left to a parser.
"""

from __future__ import annotations

from typing import Final

BACK: Final = b"\r\n"
"""Behind a chunk's data."""

_LONGEST: Final = 4096
"""Bytes of a chunk that is looked at. There is a front for each length."""


def front_of(size: int) -> bytes:
    """What stands in front of so many bytes of data."""
    return b"%x\r\n" % size


def _fronts() -> list[bytes]:
    """By the length of the whole chunk; empty where no chunk is that long."""
    fronts = [b""] * (_LONGEST + 1)
    for size in range(1, _LONGEST):
        front = front_of(size)
        length = len(front) + size + len(BACK)
        if length <= _LONGEST:
            fronts[length] = front
    return fronts


_FRONTS: Final = _fronts()


def lone_chunk(data: bytes) -> int:
    """Bytes in front of the chunk's data if ``data`` is one whole chunk and nothing else, and not the last one; 0 if
    not, or if it is long. The parser must stand between two chunks."""
    if len(data) > _LONGEST:
        return 0
    front = _FRONTS[len(data)]
    return len(front) if front and data.startswith(front) and data.endswith(BACK) else 0
