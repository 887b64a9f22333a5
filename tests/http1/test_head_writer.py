"""Status lines, request lines and header lines."""

from __future__ import annotations

import pytest

from disagg_proxy.http1.head_writer import CachedHeaderLines, header_lines, request_line, status_line


def test_header_lines() -> None:
    assert header_lines([(b"a", b"1"), (b"authorization", b"Bearer k")]) == b"a: 1\r\nauthorization: Bearer k\r\n"
    assert header_lines([]) == b""


@pytest.mark.parametrize(("status", "phrase"), [(200, b"OK"), (404, b"Not Found"), (599, b"")])
def test_status_line(status: int, phrase: bytes) -> None:
    assert status_line(status) == b"HTTP/1.1 %d %b\r\n" % (status, phrase)


def test_request_line_has_the_host() -> None:
    assert request_line("POST", "/v1/x", "[::1]:80") == b"POST /v1/x HTTP/1.1\r\nhost: [::1]:80\r\n"


def test_cached_lines_follow_the_list() -> None:
    cached = CachedHeaderLines()
    first, second = [(b"date", b"1")], [(b"date", b"2")]
    assert cached.lines(first) is cached.lines(first) == b"date: 1\r\n"
    assert cached.lines(second) == b"date: 2\r\n"
