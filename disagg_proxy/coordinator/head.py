"""What the head of a generation request says, read once for both ways in."""

from __future__ import annotations

from typing import NamedTuple

from disagg_proxy.config import Config
from disagg_proxy.http1.headers import Headers, client_request_id, forwarded_request_lines, value_of
from disagg_proxy.openai.fields import Route
from disagg_proxy.openai.prefix_hash import AffinityNeeds


class RequestHead(NamedTuple):
    """The head of one generation request.

    Attributes:
        headers: the client's, as received.
        lines: the same as lines for the instances, without X-Request-Id.
        client_id: the client's own X-Request-Id.
        session: the value of the SESSION_HEADER, where a policy needs it.
    """

    route: Route
    headers: Headers
    lines: bytes
    client_id: str | None
    session: bytes


def read_head(config: Config, wanted: AffinityNeeds, route: Route, headers: Headers) -> RequestHead:
    """Read a head; ``wanted`` says whether the choice of instances needs the session."""
    session = value_of(headers, config.session_header.lower().encode()) if wanted.session else b""
    return RequestHead(
        route, headers, forwarded_request_lines(headers, config.engine_api_key), client_request_id(headers), session
    )
