"""Recognises complete chunks of a chunked body (RFC 9112, 7.1) without a parser, as a token stream brings them.

Only the form that vLLM's server writes is recognised: lower-case digits and no extensions (uvicorn 0.20 - 0.54,
``protocols/http/httptools_impl.py``, ``send``), and data that ends with a line end, as vLLM's events do. Everything
else goes to the parser.
"""

from __future__ import annotations

from typing import Final

_END: Final = b"\n\r\n"
"""Last bytes of a chunk whose data ends with a line end."""

_MAX_LOOKUP: Final = 4096
"""Bytes of a single chunk that is recognised by a table look-up; the table has one entry for each length."""

_ZERO: Final = ord("0")
_NINE: Final = ord("9")
_A: Final = ord("a")
_F: Final = ord("f")
_CR: Final = ord("\r")
_LF: Final = ord("\n")

_MAX_CHUNK: Final = 1 << 20
"""Bytes of data; larger chunks go to the parser."""


def _size_lines() -> list[bytes]:
    """The size line of a chunk by the length of the complete chunk; empty where no chunk has that length."""
    lines = [b""] * (_MAX_LOOKUP + 1)
    for size in range(1, _MAX_LOOKUP):
        line = b"%x\r\n" % size
        length = len(line) + size + 2
        if length <= _MAX_LOOKUP:
            lines[length] = line
    return lines


_SIZE_LINES: Final = _size_lines()


def are_complete_chunks(data: bytes) -> bool:
    """Whether ``data`` is one or more complete chunks, each ending with a line end, without the terminating chunk.

    ``data`` must begin at a chunk boundary.
    """
    length = len(data)
    if length <= _MAX_LOOKUP:
        size_line = _SIZE_LINES[length]
        if size_line and data.startswith(size_line) and data.endswith(_END):
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
            if size > _MAX_CHUNK:
                return False
            at += 1
        end = at + 2 + size + 2
        if not size or end > length or data[at] != _CR or data[at + 1] != _LF or data[end - 3 : end] != _END:
            return False
        at = end
    return length > 0
