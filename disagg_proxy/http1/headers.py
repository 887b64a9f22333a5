"""Which headers are forwarded, in each direction. Bytes as on the wire, names in lower case.

Every header is forwarded except hop-by-hop ones (RFC 9110, 7.6.1), those that the proxy's own HTTP client sets, and
those that could interfere with the KV transfer: the proxy sets X-Request-Id, and X-data-parallel-rank (vLLM 0.14 and
newer) would select an engine behind the instance. CORS is decided by CORS_ORIGINS alone, although an engine may permit
more origins (``--allowed-origins``; by default all up to vLLM 0.31, none in 0.32,
``entrypoints/launchers/cli_args.py``): it gets no Origin, and Access-Control-* is forwarded in neither direction.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from disagg_proxy.http1.head_writer import header_lines
from disagg_proxy.request_id import MARKERS, RequestId, new_own_id

Headers = list[tuple[bytes, bytes]]
"""Pairs of lower-case name and value, in the order received."""


class ForwardedHeaders(Headers):
    """Headers of a response to the client, without Content-Length. Immutable by convention: responses with the same
    head share one object.

    Attributes:
        lines: the same as header lines, with a Content-Type in any case.
    """

    __slots__ = ("lines",)

    def __init__(self, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(header for header in headers if header[0] != b"content-length")
        self.lines = header_lines(self)
        if not value_of(self, b"content-type"):
            self.lines += b"content-type: application/json\r\n"


class ResponseHeaders(Headers):
    """Headers of an instance's response. Immutable by convention: responses with the same head share one object.

    Attributes:
        forwarded: cache of :func:`forwarded_response_headers`; None until the first call.
        stream: whether the body is a stream of server-sent events.
    """

    __slots__ = ("forwarded", "stream")

    def __init__(self, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(headers)
        self.forwarded: ForwardedHeaders | None = None
        self.stream = value_of(self, b"content-type").startswith(b"text/event-stream")


@lru_cache(maxsize=512)
def shared_response_headers(headers: tuple[tuple[bytes, bytes], ...]) -> ResponseHeaders:
    """One object for all responses with these headers, which an engine repeats with each stream of a second."""
    return ResponseHeaders(headers)


_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
_NOT_TO_ENGINE = _HOP_BY_HOP | frozenset(
    b"host content-length expect accept-encoding origin x-request-id x-data-parallel-rank".split()
)
_NOT_TO_CLIENT = _HOP_BY_HOP | frozenset(b"date server x-request-id request-id x-accel-buffering".split())

_CORS = b"access-control-"
"""Every other header of CORS begins with it."""

_MAX_ID_BYTES = 256

_ID_MARKER = MARKERS[0].encode()
"""Every internal request id begins with it."""


def value_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """The value of the first header ``name``; empty if there is none."""
    for found, value in headers:
        if found == name:
            return value
    return b""


_KEYS = frozenset({b"authorization", b"x-api-key"})
"""Anthropic's client sends its key as X-Api-Key."""


def without_key(headers: Headers) -> Headers:
    """``headers`` without the client's key."""
    return [header for header in headers if header[0] not in _KEYS]


def forwarded_request_lines(headers: Headers, engine_api_key: str) -> bytes:
    """The client's headers as header lines for an instance, without X-Request-Id.

    Args:
        engine_api_key: replaces the client's key, unless empty.
    """
    dropped = _dropped(headers, _NOT_TO_ENGINE)
    if engine_api_key:
        dropped |= _KEYS
    forwarded = [header for header in headers if header[0] not in dropped and not header[0].startswith(_CORS)]
    # The internal id could not be found in a compressed response.
    forwarded.append((b"accept-encoding", b"identity"))
    if engine_api_key:
        forwarded.append((b"authorization", b"Bearer " + engine_api_key.encode()))
    return header_lines(forwarded)


def forwarded_response_headers(headers: Headers, request_id: RequestId | None) -> ForwardedHeaders:
    """An instance's headers for the client: the internal request id is replaced, Content-Length is left out.

    Args:
        request_id: None if the request had no internal id.
    """
    if isinstance(headers, ResponseHeaders) and headers.forwarded is not None:
        return headers.forwarded
    dropped = _dropped(headers, _NOT_TO_CLIENT)
    found = [header for header in headers if header[0] not in dropped and not header[0].startswith(_CORS)]
    if not any(_ID_MARKER in value for _, value in found):
        forwarded = ForwardedHeaders(found)
        if isinstance(headers, ResponseHeaders):
            headers.forwarded = forwarded
        return forwarded
    if request_id is not None:
        internal, public = request_id.internal.encode(), request_id.public.encode()
        found = [(name, value.replace(internal, public)) for name, value in found]
    return ForwardedHeaders(found)


def _dropped(headers: Headers, always: frozenset[bytes]) -> frozenset[bytes]:
    """``always``, and the names that a Connection header declares hop-by-hop."""
    value = value_of(headers, b"connection")
    if not value or value.lower() == b"keep-alive":
        return always
    return always | {token.strip().lower() for token in value.split(b",")}


def client_request_id(headers: Headers) -> str | None:
    """The client's X-Request-Id, returned to it; None if it is missing, too long or not printable ASCII, or if it names
    KV addresses: MoRIIOConnector connects to those (vLLM 0.33, ``moriio_common.py``, ``get_peer_zmq_from_request_id``).
    """
    value = value_of(headers, b"x-request-id")
    if not value or len(value) > _MAX_ID_BYTES or not value.isascii():
        return None
    text = value.decode()
    return text if text.isprintable() and not any(marker in text for marker in MARKERS) else None


def request_id_of(headers: Headers) -> str:
    """The X-Request-Id of the response to a request with ``headers``: the client's own, or else a new one."""
    return client_request_id(headers) or new_own_id()


def request_id_headers(request_id: str, path: bytes) -> Headers:
    """Headers of a response to ``path`` that carry its request id.

    OpenAI's clients read X-Request-Id, Anthropic's Request-Id (anthropic 2.14, ``_exceptions.py``, ``_response.py``).
    """
    value = request_id.encode()
    found = [(b"x-request-id", value)]
    if path.startswith(b"/v1/messages"):
        found.append((b"request-id", value))
    return found


def is_stream(headers: Headers) -> bool:
    """Whether the body is a stream of server-sent events."""
    if isinstance(headers, ResponseHeaders):
        return headers.stream
    return value_of(headers, b"content-type").startswith(b"text/event-stream")
