"""Heads of answers that were read before: an instance's answers begin alike, but for the length of the body.

llhttp reads every head once and judges it. What it took is remembered by its bytes, without the digits of
Content-Length, so that the same bytes need not be read again.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from disagg_proxy.protocol.headers import AnswerHeaders

_LENGTH = re.compile(rb"\r\ncontent-length: ?(\d{1,12})\r\n", re.IGNORECASE)
_MOST = 512
"""Heads that are remembered; with the next one all are forgotten. Each second brings a new one, by its Date."""

_LONGEST = 2048


class Head(NamedTuple):
    """One that may be met again."""

    status: int
    headers: AnswerHeaders


class Heads:
    """What has been met, for all connections of a pool."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}

    def whole(self, data: bytes) -> tuple[Head, bytes] | None:
        """Head and body of an answer of which all is in ``data`` and nothing else, if its head is known."""
        end = data.find(b"\r\n\r\n", 0, _LONGEST)
        if end < 0:
            return None
        length = _LENGTH.search(data, 0, end + 2)
        if length is None or end + 4 + int(length[1]) != len(data):
            return None
        head = self._known.get(data[: length.start(1)] + data[length.end(1) : end])
        return None if head is None else (head, data[end + 4 :])

    def learn(self, data: bytes, status: int, headers: AnswerHeaders) -> None:
        """``data`` began with a head that llhttp took: a kept connection, a length, and nothing unusual."""
        end = data.find(b"\r\n\r\n", 0, _LONGEST)
        length = _LENGTH.search(data, 0, max(0, end + 2))
        if length is None:
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[data[: length.start(1)] + data[length.end(1) : end]] = Head(status, headers)
