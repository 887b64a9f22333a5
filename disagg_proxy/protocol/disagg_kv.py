"""What this project's own connector wants on the two legs: ``kv_transfer_params``, and nothing of the request id.

docs/connector.md, "What a request says".
"""

from __future__ import annotations

import secrets

from disagg_proxy.protocol.handover import with_params
from disagg_proxy.protocol.prepare import Prepared

FIELDS = ("protocol_version", "tp", "layout", "dtype", "block_size", "block_bytes", "kv_model")
"""Of an announcement, what must be equal on both sides. Every engine announces it."""

OPTIONAL = ("kv_digest",)
"""What must be equal where both sides announce it. Engines of older releases do not, so it is never required, and
neither the engines nor the proxies need to be updated first."""


class DisaggKvHandover:
    """Both legs at once, under a name that each try has for itself; any number of prompts and choices.

    Args:
        prefill_kv: the KV address that prefill announced.
    """

    in_order = False
    again = True

    def __init__(self, prefill_kv: str) -> None:
        self.transfer_id = new_transfer_id()
        self._prefill_kv = prefill_kv

    def fits(self, prepared: Prepared) -> bool:
        """Each prompt is told apart by its tokens."""
        return True

    def for_prefill(self, body: bytes) -> bytes:
        """Prefill offers its KV under the name."""
        return for_prefill(body, self.transfer_id)

    def for_decode(self, body: bytes, prefilled: bytes | None) -> bytes:
        """Decode fetches KV of that name from prefill, which need not have it yet."""
        return for_decode(body, self.transfer_id, self._prefill_kv)


def new_transfer_id() -> str:
    """As hard to guess as the KV is secret."""
    return secrets.token_hex(16)


def for_prefill(body: bytes, transfer_id: str) -> bytes:
    """Prefill offers its KV under that name."""
    return with_params(body, {"transfer_id": transfer_id})


def for_decode(body: bytes, transfer_id: str, prefill_kv: str) -> bytes:
    """Decode fetches KV of that name from the KV address that prefill announced."""
    return with_params(body, {"transfer_id": transfer_id, "from": prefill_kv})
