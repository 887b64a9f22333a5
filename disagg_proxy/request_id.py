"""The request id of P2pNcclConnector, and the id that clients see in its place.

vLLM 0.9.2 - 0.23 (``kv_connector/v1/p2p/p2p_nccl_connector.py``, ``parse_request_id``) finds the peer of a request
in its id: ``___decode_addr_(.*):(\\d+)`` on prefill, ``___prefill_addr_(.*):(\\d+)___`` on decode. The id travels as
X-Request-Id on both legs and must be the same there, since it is the key of every KV tensor. An engine that gets a
request whose id has no addresses dies.

vLLM repeats the id in its answers. It names internal addresses, so clients get a public one of the same length:
replacing it in place changes no length field and no chunk framing.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

from disagg_proxy.address import Address

MARKERS = ("___prefill_addr_", "___decode_addr_")


class RequestId(NamedTuple):
    """``internal`` goes to the instances, ``public`` to the client; both have the same length in bytes."""

    internal: str
    public: str


class _Randomness:
    """The system's, read in larger pieces: a call of its own for each id is a fifth of what the rest of it costs."""

    def __init__(self) -> None:
        self._pool = ""
        self._at = 0

    def hex(self, size: int) -> str:
        """So many bytes in hexadecimal digits."""
        at, end = self._at, self._at + 2 * size
        if end > len(self._pool):
            self._pool = secrets.token_hex(4096 + size)
            at, end = 0, 2 * size
        self._at = end
        return self._pool[at:end]


_randomness = _Randomness()


def new_request_id(prefill_kv: Address, decode_kv: Address) -> RequestId:
    """A fresh id that joins the two KV addresses, each as its instance announced it."""
    head = f"{MARKERS[0]}{prefill_kv.text}{MARKERS[1]}{decode_kv.text}_"
    digits = _randomness.hex(16 + len(head) // 2 + 1)
    unique, padding = digits[:32], digits[32 : 32 + len(head)]
    return RequestId(head + unique, unique + padding)
