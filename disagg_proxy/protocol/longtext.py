"""Long strings of a request are taken out of its JSON before it is read, and put back into what is written.

The rules look at no text, only at its length, but reading and writing 64 KiB of it cost more than the rest of the
request together. So the values of ``prompt``, ``content`` and ``text`` that are long are cut out as they stand in the
body, and a number takes the place of each: a random one of this process, which no client can know. Reading the rest
proves the shape; whether the text itself is well-formed is left to prefill, which reads it before decode does.
"""

from __future__ import annotations

import re
import secrets

LONG = 2048
"""Bytes from which on a string is taken out."""

_MOST_QUOTES = 256
"""Quotes that are looked at; a body with more is not worth it."""

_KEY = re.compile(rb'"(?:prompt|content|text)"[ \t\r\n]*:[ \t\r\n]*\Z')
_KEY_ROOM = 32

_MARK = 10**17 + secrets.randbelow(8 * 10**17)
"""The first number; all have 18 digits, so that any JSON reader takes them for whole numbers."""

_QUOTE, _BACKSLASH = b'"', 0x5C


class LongText:
    """What was taken out of one body.

    Attributes:
        rest: the body without it.
        size: bytes of the text, without its quotes. Media in ``data:`` URLs do not count.
    """

    __slots__ = ("_pieces", "rest", "size")

    def __init__(self, rest: bytes, pieces: list[bytes]) -> None:
        self.rest = rest
        self._pieces = pieces
        self.size = sum(len(piece) - 2 for piece in pieces if not piece.startswith(b'"data:'))

    def put_back(self, text: bytes) -> bytes | None:
        """JSON that was made from the rest, with the strings in their places; None when they are not all there once."""
        whole: list[bytes] = []
        copied = 0
        for number, piece in enumerate(self._pieces):
            mark = b"%d" % (_MARK + number)
            at = text.find(mark, copied)
            if at < 0 or text.find(mark, at + 1) >= 0:
                return None
            whole += text[copied:at], piece
            copied = at + len(mark)
        whole.append(text[copied:])
        return b"".join(whole)


def take_out(raw: bytes) -> LongText | None:
    """The long strings of ``raw`` apart from the rest; None when there are none, or it is not worth it."""
    kept: list[bytes] = []
    pieces: list[bytes] = []
    copied, at = 0, raw.find(_QUOTE)
    for _ in range(_MOST_QUOTES):
        if at < 0:
            break
        end = _end_of_string(raw, at)
        if end < 0:
            return None
        if end - at > LONG and _KEY.search(raw, max(0, at - _KEY_ROOM), at):
            kept += raw[copied:at], b"%d" % (_MARK + len(pieces))
            pieces.append(raw[at:end])
            copied = end
        at = raw.find(_QUOTE, end)
    else:
        return None
    if not pieces:
        return None
    kept.append(raw[copied:])
    return LongText(b"".join(kept), pieces)


def _end_of_string(raw: bytes, start: int) -> int:
    """Behind the closing quote of the string that begins at ``start``; -1 when there is none, or it has many quotes."""
    end = start
    for _ in range(_MOST_QUOTES):
        end = raw.find(_QUOTE, end + 1)
        if end < 0 or raw[end - 1] != _BACKSLASH:
            return end + 1 if end >= 0 else -1
        slashes = 1
        while raw[end - 1 - slashes] == _BACKSLASH:
            slashes += 1
        if slashes % 2 == 0:
            return end + 1
    return -1
