"""The one writer of HTTP/1.1 heads: status lines for clients, request lines for instances, header lines for both."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from http import HTTPStatus


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Header lines, each with its CRLF."""
    return b"".join([b"%s: %s\r\n" % header for header in headers])


@lru_cache(maxsize=128)
def status_line(status: int) -> bytes:
    """The first line of a response; a status without a standard phrase has an empty one."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


@lru_cache(maxsize=1024)
def request_line(method: str, path: str, netloc: str) -> bytes:
    """The first line of a request, and its Host header."""
    return f"{method} {path} HTTP/1.1\r\nhost: {netloc}\r\n".encode()


class CachedHeaderLines:
    """Header lines of a list that is replaced from time to time, such as uvicorn's default headers with their Date."""

    __slots__ = ("_headers", "_lines")

    def __init__(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._lines = b""

    def lines(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The lines of ``headers``; encoded again only for another list than at the previous call."""
        if headers is not self._headers:
            self._headers, self._lines = headers, header_lines(headers)
        return self._lines
