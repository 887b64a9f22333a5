"""What a generation request is to the flights and what their outcome is to HTTP: once, for both ways in.

``direct`` takes requests off uvicorn's connection, ``generate`` takes what is left, through Quart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, NamedTuple

from disagg_proxy.errors import ProxyError, UnsupportedEncoding
from disagg_proxy.flight.outcome import Outcome
from disagg_proxy.launch import CARRIERS, Carrier
from disagg_proxy.observe.record import Record
from disagg_proxy.protocol.fields import Route
from disagg_proxy.protocol.headers import Headers, client_request_id, request_lines, value_of
from disagg_proxy.protocol.prepare import prepare
from disagg_proxy.services import Services


class Asked(NamedTuple):
    """What the head of a generation request says.

    Attributes:
        headers: the client's, as they came; lines: as lines for the instances.
        client_id: the client's own X-Request-Id.
        session: what its SESSION_HEADER says, where a policy asks for it.
    """

    route: Route
    headers: Headers
    lines: bytes
    client_id: str | None
    session: bytes


def asked(services: Services, route: Route, headers: Headers) -> Asked:
    """Read a head."""
    config, wanted = services.config, services.launcher.wanted
    session = value_of(headers, config.session_header.lower().encode()) if wanted.session else b""
    return Asked(route, headers, request_lines(headers, config.engine_api_key), client_request_id(headers), session)


def begin(services: Services, head: Asked, body: bytes) -> Carrier | Coroutine[Any, Any, Carrier]:
    """The flight of one request, or what to await for it.

    Raises:
        ProxyError: it cannot be served.
    """
    launcher = services.launcher
    record = services.recorder.open(head.route.path, head.client_id)
    lines = head.lines
    if services.traces is not None:
        lines = request_lines(services.traces.begin(record, head.headers), services.config.engine_api_key)
    try:
        prepared = prepare(head.route, body, launcher.wanted)
        begun = launcher.launch(head.route, lines, prepared, record, head.session)
    except ProxyError as error:
        record.refuse(error)
        raise
    except Exception:
        record.refuse(ProxyError(""))
        raise
    return begun if isinstance(begun, CARRIERS) else _queued(begun, record)


async def _queued(begun: Coroutine[Any, Any, Carrier], record: Record) -> Carrier:
    """The same with the record of what does not come out of the queue."""
    try:
        return await begun
    except ProxyError as error:
        record.refuse(error)
        raise
    except asyncio.CancelledError:
        record.end()
        raise
    except Exception:
        record.refuse(ProxyError(""))
        raise


def answer_head(outcome: Outcome, client_id: str | None, flight: Carrier) -> Headers:
    """The headers of the answer, but for those of its framing."""
    return [*outcome.headers, (b"x-request-id", answer_id(client_id, flight).encode())]


def answer_id(client_id: str | None, flight: Carrier) -> str:
    """The X-Request-Id of the answer: the client's own, or one that is unique."""
    return client_id or flight.public_id[:32]


def check_encoding(headers: Headers) -> None:
    """
    Raises:
        UnsupportedEncoding: the body is compressed.
    """
    encoding = value_of(headers, b"content-encoding").lower()
    if encoding not in (b"", b"identity"):
        shown = encoding.decode("latin-1")
        raise UnsupportedEncoding(f"Content-Encoding {shown!r} is not read; send the body uncompressed.")
