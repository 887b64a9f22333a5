"""Errors in answers whose status is 200.

When vLLM fails after it has sent the head of a stream, it reports the error as an event: ``data: {"error": …}``, on
/v1/messages ``event: error`` (0.32, ``create_streaming_error_response`` and ``entrypoints/anthropic/serving.py``).
Only ``[DONE]`` follows. Up to 0.14 an unstreamed 200 may be an error object too (docs/request-fields.md, 2g).
Text that a model writes cannot look like either: it is within a JSON string, where quotes and line ends are escaped.
"""

from __future__ import annotations

import json
import re
from typing import Final, NamedTuple

from disagg_proxy.errors import ProxyError
from disagg_proxy.openai.fields import Route

_BEGINNINGS: Final = (b'data: {"error"', b"event: error", b'{"error":', b'{"object":"error"')

_EVENT: Final = re.compile(rb'^(?:data: \{"error"|event: error)', re.MULTILINE)


def stream_error(route: Route, error: ProxyError) -> bytes:
    """The event that ends a stream which the proxy must cut (STREAM_ERROR_EVENT), in the shape of the route's API.

    Clients raise it: openai 3.57 and anthropic 2.14, ``_streaming.py``. On /v1/responses it is an event of its own.
    """
    inner = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    if route.dialect == "messages":
        return b"event: error\ndata: %b\n\n" % error.body()
    if route.dialect == "responses":
        inner["type"] = "error"
        return b"event: error\ndata: %b\n\n" % json.dumps(inner).encode()
    return b"data: %b\n\n" % json.dumps({"error": inner}).encode()


class ErrorAnswer(NamedTuple):
    """The error as an answer of its own: the status that vLLM gives it, and its JSON."""

    status: int
    body: bytes


def begins_with_error(body: bytes) -> bool:
    """Whether an answer is an error from its first byte on; ``body`` is its beginning."""
    return body.startswith(_BEGINNINGS)


def error_event(body: bytes) -> ErrorAnswer | None:
    """The first error event in the end of a stream."""
    # A body that arrived in one read may be long, and a search for a text is much faster than one at every line.
    found = _EVENT.search(body) if body.find(b"error") >= 0 else None
    return None if found is None else error_in(body[found.start() :])


def error_in(body: bytes) -> ErrorAnswer:
    """The error of an answer that :func:`begins_with_error`. The status is 500 where vLLM names none."""
    start = max(0, body.find(b"{"))
    text = body[start:].partition(b"\n")[0]
    try:
        answer = json.loads(text)
        code = answer.get("error", answer).get("code")
    except (ValueError, AttributeError, RecursionError):
        code = None
    return ErrorAnswer(code if type(code) is int and 400 <= code < 600 else 500, text)
