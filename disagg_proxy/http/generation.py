"""What a generation request is to the flights and what their outcome is to HTTP: once, for both ways in.

``direct`` takes requests off uvicorn's connection, ``generate`` takes what is left, through Quart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from disagg_proxy.errors import ProxyError, UnsupportedEncoding
from disagg_proxy.flight.outcome import Outcome
from disagg_proxy.launch import Carrier
from disagg_proxy.observe.record import Record
from disagg_proxy.protocol.fields import Route
from disagg_proxy.protocol.headers import Headers, client_request_id, request_lines, value_of
from disagg_proxy.protocol.prepare import prepare
from disagg_proxy.services import Services


def begin(services: Services, route: Route, headers: Headers, body: bytes) -> Carrier | Coroutine[Any, Any, Carrier]:
    """The flight of one request, or what to await for it.

    Raises:
        ProxyError: it cannot be served.
    """
    config, launcher = services.config, services.launcher
    record = services.recorder.open(route.path, client_request_id(headers))
    if services.traces is not None:
        headers = services.traces.begin(record, headers)
    try:
        prepared = prepare(route, body, launcher.wanted)
        session = value_of(headers, config.session_header.lower().encode()) if launcher.wanted.session else b""
        lines = request_lines(headers, config.engine_api_key)
        begun = launcher.launch(route, lines, prepared, record, session)
    except ProxyError as error:
        record.refuse(error)
        raise
    except Exception:
        record.refuse(ProxyError(""))
        raise
    return _queued(begun, record) if isinstance(begun, Coroutine) else begun


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
    found = [header for header in outcome.headers if header[0] != b"content-length"]
    if not value_of(found, b"content-type"):
        found.append((b"content-type", b"application/json"))
    found.append((b"x-request-id", (client_id or flight.public_id[:32]).encode()))
    return found


def check_encoding(headers: Headers) -> None:
    """
    Raises:
        UnsupportedEncoding: the body is compressed.
    """
    encoding = value_of(headers, b"content-encoding").lower()
    if encoding not in (b"", b"identity"):
        shown = encoding.decode("latin-1")
        raise UnsupportedEncoding(f"Content-Encoding {shown!r} is not read; send the body uncompressed.")
