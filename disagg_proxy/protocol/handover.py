"""What the two legs of one request say about its KV, where ``kv_transfer_params`` says it: one module per protocol
(``disagg_kv``, ``nixl``), all behind :class:`Handover`. Such a decode computes by itself what it gets no KV for.

Clients cannot set the field themselves (``fields.strip``), so it is put in front of the object as text, and the
client's bytes stay as they are where they are UTF-8. P2pNcclConnector says it in the request id: ``p2p_nccl``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from disagg_proxy.protocol.prepare import Prepared


class Handover(Protocol):
    """The KV of one try, on its way from prefill to decode."""

    @property
    def in_order(self) -> bool:
        """Whether decode's leg needs prefill's answer; else both may be sent at once."""

    @property
    def again(self) -> bool:
        """Whether decode may be asked twice for the KV."""

    @property
    def transfer_id(self) -> str:
        """What either engine can be told to release; empty where there is no such message."""

    def fits(self, prepared: Prepared) -> bool:
        """Whether the KV of all its prompts can be handed over. If not, decode computes them."""

    def for_prefill(self, body: bytes) -> bytes:
        """Prefill's leg."""

    def for_decode(self, body: bytes, prefilled: bytes | None) -> bytes:
        """Decode's leg, from the body of prefill's 200; None: there is none, or it has not been waited for."""


def with_params(body: bytes, params: Mapping[str, Any]) -> bytes:
    """``body``, the bytes of a JSON object that has no such field, with the field in it."""
    if not json.detect_encoding(body).startswith("utf-8"):
        body = json.dumps(json.loads(body)).encode()
    brace = body.index(b"{") + 1
    rest = body[brace:]
    comma = b"" if rest.lstrip()[:1] == b"}" else b","
    return body[:brace] + b'"kv_transfer_params":' + json.dumps(params).encode() + comma + rest
