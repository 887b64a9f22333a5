"""Puts ``kv_transfer_params`` into a leg's body, for connectors that name their KV there: all but P2pNcclConnector,
which names it by the request id.

Clients cannot set the field (``fields.strip``), so it is inserted as text at the front of the object; the rest of the
body stays as it is if it is UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def with_params(body: bytes, params: Mapping[str, Any]) -> bytes:
    """``body``, the bytes of a JSON object that has no such field, with the field in it."""
    if not json.detect_encoding(body).startswith("utf-8"):
        body = json.dumps(json.loads(body)).encode()
    brace = body.index(b"{") + 1
    rest = body[brace:]
    comma = b"" if rest.lstrip()[:1] == b"}" else b","
    return body[:brace] + b'"kv_transfer_params":' + json.dumps(params).encode() + comma + rest
