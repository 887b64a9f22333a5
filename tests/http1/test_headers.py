"""Which headers are forwarded."""

from __future__ import annotations

import pytest

from disagg_proxy.http1.headers import (
    Headers,
    client_request_id,
    forwarded_request_lines,
    forwarded_response_headers,
    is_stream,
    value_of,
)
from disagg_proxy.request_id import RequestId

ID = RequestId("___prefill_addr_127.0.0.1:1___decode_addr_127.0.0.1:2_00ff", "ab" * 29)
IDENTITY = b"accept-encoding: identity\r\n"

CORS_REQUEST = [
    b"origin",
    *(b"access-control-request-%b" % name for name in (b"method", b"headers", b"private-network")),
]
CORS_RESPONSE = [
    *(b"access-control-allow-%b" % name for name in (b"origin", b"credentials", b"headers", b"methods")),
    b"access-control-expose-headers",
    b"access-control-max-age",
]

HOP_BY_HOP = [
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
]


@pytest.mark.parametrize(
    "name",
    [*HOP_BY_HOP, *CORS_REQUEST, b"host", b"content-length", b"expect", b"x-request-id", b"x-data-parallel-rank"],
)
def test_headers_that_are_not_forwarded_to_an_engine(name: bytes) -> None:
    assert forwarded_request_lines([(name, b"x"), (name, b"y")], "") == IDENTITY


@pytest.mark.parametrize("name", [*HOP_BY_HOP, *CORS_RESPONSE, b"date", b"server", b"x-request-id"])
def test_headers_that_are_not_forwarded_to_the_client(name: bytes) -> None:
    assert forwarded_response_headers([(name, b"x"), (name, b"y")], ID) == []


@pytest.mark.parametrize(
    "name", [b"authorization", b"x-api-key", b"traceparent", b"content-type", b"cookie", b"x-any", b"accept"]
)
def test_headers_that_are_forwarded_unchanged(name: bytes) -> None:
    assert forwarded_request_lines([(name, b"x"), (name, b"y")], "") == b"%b: x\r\n%b: y\r\n" % (name, name) + IDENTITY


def test_compression_is_never_requested() -> None:
    assert forwarded_request_lines([(b"accept-encoding", b"gzip")], "") == IDENTITY


def test_the_engines_key_replaces_the_clients_in_every_place() -> None:
    headers = [(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b"), (b"x-api-key", b"c"), (b"x", b"d")]
    assert forwarded_request_lines(headers, "key") == b"x: d\r\n" + IDENTITY + b"authorization: Bearer key\r\n"


@pytest.mark.parametrize(
    ("value", "dropped"),
    [
        (b"", set()),
        (b"close", set()),
        (b"Keep-Alive", set()),
        (b"keep-alive, X-Hop,x-b ", {b"x-hop", b"x-b"}),
        (b"x-hop", {b"x-hop"}),
    ],
)
def test_headers_that_connection_names_are_dropped_both_ways(value: bytes, dropped: set[bytes]) -> None:
    own = [(b"x-hop", b"1"), (b"x-b", b"2"), (b"x", b"3")]
    headers = [(b"connection", value), *own]
    left = [header for header in own if header[0] not in dropped]
    assert forwarded_response_headers(headers, ID) == left
    assert forwarded_request_lines(headers, "") == b"".join(b"%b: %b\r\n" % header for header in left) + IDENTITY


@pytest.mark.parametrize("value", ["déjà".encode(), "東".encode(), b"caf\xe9", b"plain", b""])
def test_bytes_beyond_ascii_are_forwarded_both_ways(value: bytes) -> None:
    assert forwarded_request_lines([(b"x", value)], "") == b"x: " + value + b"\r\n" + IDENTITY
    assert forwarded_response_headers([(b"x", value)], ID) == [(b"x", value)]


def test_the_internal_id_is_replaced_in_any_header_and_repeated_headers_stay() -> None:
    cookies = [(b"set-cookie", b"a"), (b"set-cookie", b"b")]
    note = (b"x-note", b"<%b>" % ID.internal.encode())
    assert forwarded_response_headers([note, *cookies], ID) == [(b"x-note", b"<%b>" % ID.public.encode()), *cookies]
    assert forwarded_response_headers([note, *cookies], None) == [note, *cookies]


@pytest.mark.parametrize(
    ("value", "returned"),
    [
        (b"mine-1", True),
        (b"with space", True),
        (b"a" * 256, True),
        (b"a" * 257, False),
        (b"", False),
        ("é".encode(), False),
        (b"a\x01", False),
        (b"a\xff", False),
    ],
)
def test_the_clients_request_id(value: bytes, returned: bool) -> None:
    assert client_request_id([(b"x", b"other"), (b"x-request-id", value)]) == (value.decode() if returned else None)


def test_no_request_id_from_the_client() -> None:
    assert client_request_id([]) is None


@pytest.mark.parametrize(
    ("headers", "streamed"),
    [
        ([(b"content-type", b"text/event-stream")], True),
        ([(b"content-type", b"text/event-stream; charset=utf-8")], True),
        ([(b"content-type", b"application/json")], False),
        ([(b"content-type", b"")], False),
        ([], False),
    ],
)
def test_is_stream(headers: Headers, streamed: bool) -> None:
    assert is_stream(headers) is streamed


def test_the_first_of_several_counts() -> None:
    headers = [(b"a", b"1"), (b"b", b"2"), (b"b", b"3")]
    assert [value_of(headers, name) for name in (b"a", b"b", b"c")] == [b"1", b"2", b""]
