"""Keys of transfers: the transfer id that the proxy chose, plus a fingerprint of the prompt.

One HTTP request can become several engine requests (a list of prompts, ``n`` > 1) with the same
``kv_transfer_params``. Prefill and decode schedule them in any order and must still agree on which KV belongs to
which, so the key includes a fingerprint of what determines the KV: token ids, LoRA, cache salt, multimodal items. Two
engine requests with the same key need the same KV and share one transfer.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from disagg_kv.protocol.frames import WireError

_TRANSFER_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, order=True)
class Key:
    """Identifies the KV of one prompt in one transfer."""

    transfer: str
    prompt: str

    def to_wire(self) -> dict[str, str]:
        return {"t": self.transfer, "p": self.prompt}

    @classmethod
    def from_wire(cls, body: dict[str, Any]) -> Key:
        """Decode a key.

        Raises:
            WireError: malformed.
        """
        prompt = body.get("p")
        if not isinstance(prompt, str) or not _FINGERPRINT.fullmatch(prompt):
            raise WireError("not the fingerprint of a prompt")
        return cls(transfer_id(body.get("t")), prompt)


def transfer_id(value: object) -> str:
    """Return the value if it can name a transfer: 1 to 128 of ``A-Za-z0-9_.:-``.

    Raises:
        WireError: it cannot.
    """
    if not isinstance(value, str) or not _TRANSFER_ID.fullmatch(value):
        raise WireError("not a transfer id")
    return value


def fingerprint(tokens: Sequence[int], extras: Sequence[str] = ()) -> str:
    """Return 32 hexadecimal digits that are equal exactly when the KV of two prompts is."""
    digest = hashlib.sha256(array("q", tokens).tobytes())
    for extra in extras:
        digest.update(len(extra).to_bytes(8, "big") + extra.encode())
    return digest.hexdigest()[:32]


def parse_address(value: object) -> tuple[str, int]:
    """Parse ``"127.0.0.1:21001"`` or ``"[::1]:21001"`` to (ip, port). Names are not resolved.

    Raises:
        WireError: malformed.
    """
    if not isinstance(value, str):
        raise WireError("not an address")
    host, colon, port = value.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise WireError(f"not an IP address and port: {value[:80]!r}") from None
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise WireError(f"not an IP address and port: {value[:80]!r}")
    return str(ip), int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
