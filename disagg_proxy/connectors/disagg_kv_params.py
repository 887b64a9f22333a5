"""What this project's own connector wants on the two legs: ``kv_transfer_params``, and nothing of the request id.

docs/connector.md, "What a request says".
"""

from __future__ import annotations

import secrets

from disagg_proxy.connectors.kv_transfer_params import with_params

FIELDS = ("protocol_version", "tp", "layout", "dtype", "block_size", "block_bytes", "kv_model")
"""Of an announcement, what must be equal on both sides. Every engine announces it."""

OPTIONAL = ("kv_digest",)
"""What must be equal where both sides announce it. Engines of older releases do not, so it is never required, and
neither the engines nor the proxies need to be updated first."""


def new_transfer_id() -> str:
    """As hard to guess as the KV is secret."""
    return secrets.token_hex(16)


def for_prefill(body: bytes, transfer_id: str) -> bytes:
    """Prefill offers its KV under that name."""
    return with_params(body, {"transfer_id": transfer_id})


def for_decode(body: bytes, transfer_id: str, prefill_kv: str) -> bytes:
    """Decode fetches KV of that name from the KV address that prefill announced."""
    return with_params(body, {"transfer_id": transfer_id, "from": prefill_kv})
