"""Which request heads are refused. tests/faults/test_hostile_clients.py sends them over sockets."""

from __future__ import annotations

import pytest

from disagg_proxy.errors import BadRequest, HeadTooLarge, UnsupportedEncoding, UnsupportedVersion
from disagg_proxy.server.request_head import (
    MAX_HEADERS,
    HeadFields,
    check_encoding,
    check_size,
    check_target,
    check_version,
)

HOST = (b"host", b"proxy")
LENGTH = (b"content-length", b"3")
CHUNKED = (b"transfer-encoding", b"chunked")


def fields(*headers: tuple[bytes, bytes]) -> HeadFields:
    found = HeadFields()
    for name, value in headers:
        found.add(name, value)
    return found


def test_fields_are_stored_until_a_reset() -> None:
    found = fields(HOST, LENGTH, (b"expect", b"100-Continue"))
    assert (found.has_host, found.length, found.chunked, found.expects_continue) == (True, 3, False, True)
    found.reset()
    found.add(*CHUNKED)
    assert (found.has_host, found.length, found.chunked, found.expects_continue) == (False, 0, True, False)


@pytest.mark.parametrize(
    "headers",
    [
        (HOST, HOST),
        ((b"host", b"a b"),),
        ((b"host", b"a..b"),),
        ((b"host", b"a" * 64),),
        (LENGTH, LENGTH),
        (LENGTH, CHUNKED),
        (CHUNKED, LENGTH),
        ((b"transfer-encoding", b"gzip, chunked"),),
        ((b"transfer-encoding", b""),),
    ],
)
def test_ambiguous_fields_are_refused(headers: tuple[tuple[bytes, bytes], ...]) -> None:
    with pytest.raises(BadRequest):
        fields(*headers)


@pytest.mark.parametrize(("version", "headers"), [("1.1", [HOST, CHUNKED]), ("1.0", [LENGTH])])
def test_supported_versions(version: str, headers: list[tuple[bytes, bytes]]) -> None:
    check_version(version, fields(*headers))


@pytest.mark.parametrize(
    ("version", "headers", "error"),
    [
        ("1.1", [], BadRequest),
        ("1.0", [CHUNKED], BadRequest),
        ("2.0", [HOST], UnsupportedVersion),
        ("0.9", [], UnsupportedVersion),
    ],
)
def test_refused_versions(version: str, headers: list[tuple[bytes, bytes]], error: type[Exception]) -> None:
    with pytest.raises(error):
        check_version(version, fields(*headers))


@pytest.mark.parametrize(("method", "target"), [(b"GET", b"/a?b"), (b"OPTIONS", b"*")])
def test_valid_targets(method: bytes, target: bytes) -> None:
    check_target(method, target)


@pytest.mark.parametrize(
    ("method", "target"),
    [(b"GET", b"*"), (b"GET", b"http://a/"), (b"GET", b"/a#b"), (b"CONNECT", b"/"), (b"CONNECT", b"a:80")],
)
def test_refused_targets(method: bytes, target: bytes) -> None:
    with pytest.raises(BadRequest):
        check_target(method, target)


def test_a_head_within_its_limits() -> None:
    check_size(b"/" * 40, [(b"a", b"b")] * 10, 100, 100)
    check_size(b"/", [(b"a", b"b")] * MAX_HEADERS, 0, 10_000)


@pytest.mark.parametrize(("target", "count", "other"), [(b"/" * 101, 0, 0), (b"/", 20, 0), (b"/", 0, 101)])
def test_a_head_that_is_too_long(target: bytes, count: int, other: int) -> None:
    with pytest.raises(HeadTooLarge, match="MAX_HEADER_BYTES"):
        check_size(target, [(b"a", b"b")] * count, other, 100)


def test_too_many_headers() -> None:
    with pytest.raises(HeadTooLarge, match="more than 100 headers"):
        check_size(b"/", [(b"a", b"b")] * (MAX_HEADERS + 1), 0, 10_000)


def test_compressed_bodies_are_refused() -> None:
    check_encoding([(b"content-encoding", b"Identity")])
    check_encoding([])
    with pytest.raises(UnsupportedEncoding, match="'gzip'"):
        check_encoding([(b"content-encoding", b"gzip")])
