"""Which headers cross, as pure functions."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from disagg_proxy.protocol.headers import (
    answer_headers,
    client_request_id,
    connection_tokens,
    is_stream,
    request_headers,
)
from disagg_proxy.protocol.p2p_nccl import RequestId

NONE: frozenset[str] = frozenset()
ID = RequestId("___prefill_addr_127.0.0.1:1___decode_addr_127.0.0.1:2_00ff", "ab" * 29)

HOP_BY_HOP = [
    "Connection",
    "Keep-Alive",
    "Proxy-Authenticate",
    "Proxy-Authorization",
    "Proxy-Connection",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
]


@pytest.mark.parametrize(
    "name", [*HOP_BY_HOP, "Host", "Content-Length", "Expect", "X-Request-Id", "X-data-parallel-rank"]
)
@pytest.mark.parametrize("spelling", [str, str.lower, str.upper])
def test_what_does_not_reach_an_engine(name, spelling) -> None:
    assert dict(request_headers([(spelling(name), "x")], NONE, "")) == {"Accept-Encoding": "identity"}


@pytest.mark.parametrize("name", [*HOP_BY_HOP, "Date", "Server", "X-Request-Id"])
def test_what_does_not_reach_the_client(name) -> None:
    assert answer_headers({name: "x", name.lower(): "y"}, ID) == []


@pytest.mark.parametrize(
    "name", ["Authorization", "X-Api-Key", "traceparent", "Content-Type", "Cookie", "X-Any", "Accept"]
)
def test_what_passes_as_it_is(name) -> None:
    assert request_headers([(name, "x"), (name, "y")], NONE, "").getall(name) == ["x", "y"]


def test_compression_is_never_asked_for() -> None:
    assert request_headers([("accept-encoding", "gzip")], NONE, "").getall("Accept-Encoding") == ["identity"]


def test_the_engines_key_replaces_the_clients_in_every_place() -> None:
    pairs = [("authorization", "Bearer a"), ("Authorization", "Bearer b"), ("x-api-key", "c")]
    got = request_headers(pairs, NONE, "key")
    assert got.getall("Authorization") == ["Bearer key"] and "X-Api-Key" not in got


@pytest.mark.parametrize(
    ("value", "tokens"),
    [("", set()), ("close", {"close"}), ("keep-alive, X-Hop,x-b ", {"keep-alive", "x-hop", "x-b"})],
)
def test_names_in_connection(value, tokens) -> None:
    assert connection_tokens({"Connection": value}) == tokens
    assert connection_tokens({}) == set()


def test_headers_that_connection_names_are_dropped_both_ways() -> None:
    assert "X-Hop" not in request_headers([("X-Hop", "1")], frozenset({"x-hop"}), "")
    assert answer_headers(CIMultiDict({"connection": "x-hop", "X-Hop": "1", "X": "2"}), ID) == [("X", "2")]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(b"d\xc3\xa9j\xc3\xa0", "déjà"), (b"\xe6\x9d\xb1", "東"), (b"caf\xe9", "café"), (b"plain", "plain")],
)
def test_text_beyond_ascii_is_not_encoded_twice(raw, expected) -> None:
    assert request_headers([("X", raw.decode("latin-1"))], NONE, "")["X"] == expected


def test_the_internal_id_is_hidden_in_any_header_and_repeats_stay() -> None:
    headers = CIMultiDictProxy(CIMultiDict([("X-Note", f"<{ID.internal}>"), ("Set-Cookie", "a"), ("Set-Cookie", "b")]))
    assert answer_headers(headers, ID) == [("X-Note", f"<{ID.public}>"), ("Set-Cookie", "a"), ("Set-Cookie", "b")]
    assert answer_headers(headers, None)[0] == ("X-Note", f"<{ID.internal}>")


@pytest.mark.parametrize(
    ("value", "returned"),
    [
        ("mine-1", True),
        ("with space", True),
        ("a" * 256, True),
        ("a" * 257, False),
        ("", False),
        ("é", False),
        ("a\x01", False),
    ],
)
def test_the_clients_request_id(value, returned) -> None:
    assert client_request_id({"X-Request-Id": value}) == (value if returned else None)


@pytest.mark.parametrize(
    ("kind", "streamed"),
    [("text/event-stream", True), ("text/event-stream; charset=utf-8", True), ("application/json", False), ("", False)],
)
def test_is_stream(kind, streamed) -> None:
    assert is_stream({"Content-Type": kind}) is streamed
    assert not is_stream({})
