"""Heads of HTTP/1.1 messages that were read before. Who is on one connection says the same again and again.

A parser (llhttp, strict) reads every head once, and its user judges it. What came of that is remembered by the head's
bytes, all of them but two values: the digits of Content-Length, and X-Request-Id where it is made of nothing but
letters, digits and ``_.:-``. The same bytes mean the same, so they need not be read again. Those that have come with
the same length before, and have no X-Request-Id, need not even be searched for the two.
"""

from __future__ import annotations

import re
from typing import Generic, TypeVar

T = TypeVar("T")

LONGEST = 4096
"""Bytes of a head that is remembered."""

_MOST = 512
"""Heads that are remembered; with the next one all are forgotten. An engine's are new each second, by their Date."""

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?(\d{1,12})\r\n")
_ID = re.compile(rb"\r\n[Xx]-[Rr]equest-[Ii][Dd]: ?([\w.:-]{1,128})(?=\r\n|\Z)", re.ASCII)

_SOME = b"\0"
"""Stands for an id; none is another head."""


class HeadCache(Generic[T]):
    """What was made of each head.

    A message is given as its bytes from the first one on, as much as has come.

    Args:
        ids: whether heads may have an X-Request-Id of their own; without, those that have are remembered as they are.
    """

    def __init__(self, ids: bool = True) -> None:
        self._ids = ids
        self._known: dict[bytes, T] = {}
        self._same: dict[bytes, tuple[bytes, int]] = {}  # by all bytes of the head: its key there, and the length

    def __len__(self) -> int:
        return len(self._known)

    def meet(self, data: bytes) -> tuple[T, int, int, bytes] | None:
        """What was made of the head in ``data``, where the body begins, its length, and the X-Request-Id (empty where
        there is none); None for a head that is not known."""
        end = data.find(b"\r\n\r\n", 0, LONGEST)
        if end < 0:
            return None
        whole = data[:end]
        same = self._same.get(whole)
        if same is not None:
            what = self._known.get(same[0])
            return None if what is None else (what, end + 4, same[1], b"")
        length = _LENGTH.search(data, 0, end + 2)
        if length is None:
            return None
        start, stop = length.span(1)
        head, name = data[:start] + data[stop:end], b""
        found = _ID.search(head) if self._ids else None
        if found is not None:
            name = found[1]
            start, stop = found.span(1)
            head = head[:start] + _SOME + head[stop:]
        what = self._known.get(head)
        if what is None:
            return None
        size = int(length[1])
        if not name:
            if len(self._same) >= _MOST:
                self._same.clear()
            self._same[whole] = head, size
        return what, end + 4, size, name

    def learn(self, data: bytes, what: T) -> None:
        """A parser has taken the head at the beginning of ``data``, with a Content-Length, and that is what it means
        whatever the two values are."""
        end = data.find(b"\r\n\r\n", 0, LONGEST)
        length = _LENGTH.search(data, 0, end + 2) if end > 0 else None
        if length is None:
            return
        head = data[: length.start(1)] + data[length.end(1) : end]
        found = _ID.search(head) if self._ids else None
        if found is not None:
            head = head[: found.start(1)] + _SOME + head[found.end(1) :]
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[head] = what
