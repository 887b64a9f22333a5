"""Which headers cross the proxy, in each direction.

Everything passes but what belongs to one connection (RFC 9110, 7.6.1), what the client library sets itself, and
what could reach into the KV transfer: the request id is the proxy's own, and X-data-parallel-rank (vLLM 0.14 and
newer) would pick an engine behind the instance. Remote-Addr is no header of the client's: Quart adds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from multidict import CIMultiDict, CIMultiDictProxy

from disagg_proxy.protocol.p2p_nccl import RequestId

_HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    "upgrade".split()
)
_REQUEST_OWN = _HOP_BY_HOP | frozenset(
    "host content-length expect accept-encoding x-request-id x-data-parallel-rank remote-addr".split()
)
_ANSWER_OWN = _HOP_BY_HOP | frozenset("date server x-request-id".split())

_MAX_ID = 256


NO_HEADERS: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict())


class Lookup(Protocol):
    """Headers by name, whatever the case."""

    def get(self, key: str, default: str) -> str: ...


def connection_tokens(headers: Lookup) -> frozenset[str]:
    """Header names that a Connection header declares hop-by-hop."""
    value = headers.get("Connection", "")
    return frozenset(token.strip().lower() for token in value.split(",")) if value else frozenset()


def request_headers(pairs: Iterable[tuple[str, str]], dropped: frozenset[str], engine_api_key: str) -> CIMultiDict[str]:
    """The client's headers as they go to an instance, still without X-Request-Id.

    Args:
        dropped: what :func:`connection_tokens` found.
        engine_api_key: replaces the client's own key when it is set.
    """
    kept = CIMultiDict(
        (name, value if value.isascii() else _as_sent(value))
        for name, value in pairs
        if (lower := name.lower()) not in _REQUEST_OWN and lower not in dropped
    )
    # A compressed answer could not be searched for the internal id.
    kept["Accept-Encoding"] = "identity"
    if engine_api_key:
        # Where Anthropic's client puts its key.
        kept.popall("X-Api-Key", None)
        kept["Authorization"] = f"Bearer {engine_api_key}"
    return kept


def _as_sent(value: str) -> str:
    """Bytes beyond ASCII arrive read as Latin-1 and leave as UTF-8: undone where UTF-8 is what they are."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def answer_headers(headers: Mapping[str, str], request_id: RequestId | None) -> list[tuple[str, str]]:
    """An instance's headers as they go to the client, with no trace of the internal id."""
    dropped = connection_tokens(headers)
    found = [
        (name, value)
        for name, value in headers.items()
        if (lower := name.lower()) not in _ANSWER_OWN and lower not in dropped
    ]
    if request_id is None:
        return found
    return [(name, value.replace(request_id.internal, request_id.public)) for name, value in found]


def client_request_id(headers: Lookup) -> str | None:
    """The client's own X-Request-Id, to be returned to it; None when there is none worth returning."""
    value = headers.get("X-Request-Id", "")
    return value if value and len(value) <= _MAX_ID and value.isascii() and value.isprintable() else None


def is_stream(headers: Mapping[str, str]) -> bool:
    """Whether the body is a stream of server-sent events."""
    return headers.get("Content-Type", "").startswith("text/event-stream")
