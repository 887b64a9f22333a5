"""Which headers cross the proxy, in each direction. All in the bytes of the wire, with names in lower case.

Everything passes but what belongs to one connection (RFC 9110, 7.6.1), what the client library sets itself, and
what could reach into the KV transfer: the request id is the proxy's own, and X-data-parallel-rank (vLLM 0.14 and
newer) would pick an engine behind the instance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from http import HTTPStatus

from disagg_proxy.request_id import MARKERS, RequestId

Headers = list[tuple[bytes, bytes]]
"""Name in lower case and value, in the order of the wire."""


class ForwardedHeaders(Headers):
    """Those of an answer on their way to the client, but for Content-Length. Not to be changed: answers with the same
    head share them.

    Attributes:
        lines: the same as lines of the wire, in any case with a Content-Type.
    """

    __slots__ = ("lines",)

    def __init__(self, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(header for header in headers if header[0] != b"content-length")
        self.lines = lines_of(self)
        if not value_of(self, b"content-type"):
            self.lines += b"content-type: application/json\r\n"


class ResponseHeaders(Headers):
    """Those of an instance's answer. Not to be changed: answers with the same head share them.

    Attributes:
        passed: what goes on to the client, once that was found out; ``stream``: whether the body is one of events.
    """

    __slots__ = ("passed", "stream")

    def __init__(self, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(headers)
        self.passed: ForwardedHeaders | None = None
        self.stream = value_of(self, b"content-type").startswith(b"text/event-stream")


_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
_REQUEST_OWN = _HOP_BY_HOP | frozenset(
    b"host content-length expect accept-encoding x-request-id x-data-parallel-rank".split()
)
_ANSWER_OWN = _HOP_BY_HOP | frozenset(b"date server x-request-id".split())

_MAX_ID = 256

_MARK = MARKERS[0].encode()
"""What every internal id begins with."""


def value_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """The value of the first header called ``name``; empty when there is none."""
    for found, value in headers:
        if found == name:
            return value
    return b""


def lines_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """As lines of the wire."""
    return b"".join([b"%s: %s\r\n" % header for header in headers])


@lru_cache(maxsize=128)
def status_line(status: int) -> bytes:
    """The first line of an HTTP/1.1 answer."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


def encode_headers(headers: Mapping[str, str]) -> bytes:
    """Header lines of a request of the proxy's own."""
    return b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())


def request_lines(headers: Headers, engine_api_key: str) -> bytes:
    """The client's headers as lines for an instance, still without X-Request-Id.

    Args:
        engine_api_key: replaces the client's own key when it is set.
    """
    dropped = _dropped(headers, _REQUEST_OWN)
    if engine_api_key:
        # X-Api-Key is where Anthropic's client puts its key.
        dropped |= {b"authorization", b"x-api-key"}
    lines = [b"%s: %s\r\n" % header for header in headers if header[0] not in dropped]
    # A compressed answer could not be searched for the internal id.
    lines.append(b"accept-encoding: identity\r\n")
    if engine_api_key:
        lines.append(b"authorization: Bearer %s\r\n" % engine_api_key.encode())
    return b"".join(lines)


def answer_headers(headers: Headers, request_id: RequestId | None) -> ForwardedHeaders:
    """An instance's headers as they go to the client, with no trace of the internal id, and without Content-Length."""
    if isinstance(headers, ResponseHeaders) and headers.passed is not None:
        return headers.passed
    dropped = _dropped(headers, _ANSWER_OWN)
    found = [header for header in headers if header[0] not in dropped]
    marked = [value for _, value in found if _MARK in value]
    if not marked:
        passed = ForwardedHeaders(found)
        if isinstance(headers, ResponseHeaders):
            headers.passed = passed
        return passed
    if request_id is not None:
        internal, public = request_id.internal.encode(), request_id.public.encode()
        found = [(name, value.replace(internal, public)) for name, value in found]
    return ForwardedHeaders(found)


def _dropped(headers: Headers, own: frozenset[bytes]) -> frozenset[bytes]:
    """``own``, and the names that a Connection header declares hop-by-hop."""
    value = value_of(headers, b"connection")
    if not value or value.lower() == b"keep-alive":
        return own
    return own | {token.strip().lower() for token in value.split(b",")}


def client_request_id(headers: Headers) -> str | None:
    """The client's own X-Request-Id, to be returned to it; None when there is none worth returning."""
    value = value_of(headers, b"x-request-id")
    if not value or len(value) > _MAX_ID or not value.isascii():
        return None
    text = value.decode()
    return text if text.isprintable() else None


def is_stream(headers: Headers) -> bool:
    """Whether the body is a stream of server-sent events."""
    if isinstance(headers, ResponseHeaders):
        return headers.stream
    return value_of(headers, b"content-type").startswith(b"text/event-stream")
