"""Cache of parsed HTTP/1.1 heads: a peer repeats the same head on every message, except for a length and an id.

llhttp parses and the caller validates every head once. The result is stored under the bytes of the head without two
values: the digits of Content-Length, and X-Request-Id if it consists of letters, digits and ``_.:-``. Identical bytes
have an identical meaning, so the next message with them needs no parser. A second index holds complete heads without
X-Request-Id; for those even the search for the two values is skipped.
"""

from __future__ import annotations

import re
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_HEAD_BYTES = 4096
"""Longer heads are not cached."""

_MAX_HEADS = 512
"""Capacity; a full cache is cleared. An engine's heads change every second with their Date."""

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?(\d{1,12})\r\n")
_ID = re.compile(rb"\r\n[Xx]-[Rr]equest-[Ii][Dd]: ?([\w.:-]{1,128})(?=\r\n|\Z)", re.ASCII)

_ID_PLACEHOLDER = b"\0"
"""Replaces an id in the key. Not valid in a head, so no key collides with a head that was received."""


class HeadCache(Generic[T]):
    """Maps heads to what was parsed from them.

    Args:
        ids: whether X-Request-Id is left out of the key. If not, heads with different ids are different entries.
    """

    def __init__(self, ids: bool = True) -> None:
        self._ids = ids
        self._entries: dict[bytes, T] = {}
        self._exact: dict[bytes, tuple[bytes, int]] = {}  # complete head -> key in _entries, Content-Length

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all heads: what was read from them is no longer valid."""
        self._entries.clear()
        self._exact.clear()

    def get(self, data: bytes) -> tuple[T, int, int, bytes] | None:
        """Look up the head at the beginning of ``data``.

        Returns:
            The stored value, the offset of the body, its Content-Length in bytes, and the X-Request-Id (empty if there
            is none); None for an unknown or incomplete head.
        """
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
        if end < 0:
            return None
        complete = data[:end]
        exact = self._exact.get(complete)
        if exact is not None:
            value = self._entries.get(exact[0])
            return None if value is None else (value, end + 4, exact[1], b"")
        length = _LENGTH.search(data, 0, end + 2)
        if length is None:
            return None
        start, stop = length.span(1)
        key, request_id = data[:start] + data[stop:end], b""
        found = _ID.search(key) if self._ids else None
        if found is not None:
            request_id = found[1]
            start, stop = found.span(1)
            key = key[:start] + _ID_PLACEHOLDER + key[stop:]
        value = self._entries.get(key)
        if value is None:
            return None
        size = int(length[1])
        if not request_id:
            if len(self._exact) >= _MAX_HEADS:
                self._exact.clear()
            self._exact[complete] = key, size
        return value, end + 4, size, request_id

    def put(self, data: bytes, value: T) -> None:
        """Store ``value`` for the head at the beginning of ``data``; ignored without a Content-Length.

        A parser must have accepted the head, and ``value`` must not depend on the length or the id.
        """
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
        length = _LENGTH.search(data, 0, end + 2) if end > 0 else None
        if length is None:
            return
        key = data[: length.start(1)] + data[length.end(1) : end]
        found = _ID.search(key) if self._ids else None
        if found is not None:
            key = key[: found.start(1)] + _ID_PLACEHOLDER + key[found.end(1) :]
        if len(self._entries) >= _MAX_HEADS:
            self._entries.clear()
        self._entries[key] = value
