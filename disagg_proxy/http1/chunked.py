"""Whole chunks of a chunked body (RFC 9112, 7.1), as the tokens of a stream come: one by one, or several at once.

Only the form in which vLLM's server writes them counts: lower-case digits, no extensions (uvicorn 0.20 - 0.54,
``protocols/http/httptools_impl.py``, ``send``), and in each of them whole lines, as vLLM's events are. Everything else
is left to a parser.
"""

from __future__ import annotations

from typing import Final

_END: Final = b"\n\r\n"
"""Of a chunk of whole lines."""

_LONGEST: Final = 4096
"""Bytes of a single chunk that is recognised at a glance. There is a front for each length."""

_ZERO: Final = ord("0")
_NINE: Final = ord("9")
_A: Final = ord("a")
_F: Final = ord("f")
_CR: Final = ord("\r")
_LF: Final = ord("\n")

_MOST: Final = 1 << 20
"""Bytes of a chunk that is followed to its end."""


def _fronts() -> list[bytes]:
    """What stands in front of a chunk's data, by the length of the whole chunk; empty where no chunk is that long."""
    fronts = [b""] * (_LONGEST + 1)
    for size in range(1, _LONGEST):
        front = b"%x\r\n" % size
        length = len(front) + size + 2
        if length <= _LONGEST:
            fronts[length] = front
    return fronts


_FRONTS: Final = _fronts()


def are_whole(data: bytes) -> bool:
    """Whether ``data`` is one or more whole chunks of whole lines and nothing else, none of them the last one of its
    body. The parser must stand between two chunks."""
    length = len(data)
    if length <= _LONGEST:
        front = _FRONTS[length]
        if front and data.startswith(front) and data.endswith(_END):
            return True
    at = 0
    while at < length:
        if data[at] == _ZERO:
            return False
        size = 0
        while at < length:
            digit = data[at]
            if _ZERO <= digit <= _NINE:
                size = size * 16 + digit - _ZERO
            elif _A <= digit <= _F:
                size = size * 16 + digit - _A + 10
            else:
                break
            if size > _MOST:
                return False
            at += 1
        end = at + 2 + size + 2
        if not size or end > length or data[at] != _CR or data[at + 1] != _LF or data[end - 3 : end] != _END:
            return False
        at = end
    return length > 0
