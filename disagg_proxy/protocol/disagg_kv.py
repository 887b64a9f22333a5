"""What this project's own connector wants on the two legs: ``kv_transfer_params``, and nothing of the request id.

docs/connector.md, "What a request says". Clients cannot set the field themselves (``fields.strip``), so it is put in
front of the object as text, and the client's bytes stay as they are where they are UTF-8.
"""

from __future__ import annotations

import json
import secrets

FIELDS = ("protocol_version", "tp", "layout", "dtype", "block_size", "block_bytes", "kv_model")
"""Of an announcement, what must be equal on both sides."""


def new_transfer_id() -> str:
    """As hard to guess as the KV is secret."""
    return secrets.token_hex(16)


def for_prefill(body: bytes, transfer_id: str) -> bytes:
    """Prefill offers its KV under that name."""
    return _with_params(body, {"transfer_id": transfer_id})


def for_decode(body: bytes, transfer_id: str, prefill_kv: str) -> bytes:
    """Decode fetches KV of that name from the KV address that prefill announced."""
    return _with_params(body, {"transfer_id": transfer_id, "from": prefill_kv})


def _with_params(body: bytes, params: dict[str, str]) -> bytes:
    """``body``, the bytes of a JSON object that has no such field, with the field in it."""
    if not json.detect_encoding(body).startswith("utf-8"):
        body = json.dumps(json.loads(body)).encode()
    brace = body.index(b"{") + 1
    rest = body[brace:]
    comma = b"" if rest.lstrip()[:1] == b"}" else b","
    return body[:brace] + b'"kv_transfer_params":' + json.dumps(params).encode() + comma + rest
