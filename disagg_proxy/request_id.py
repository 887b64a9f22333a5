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


# -- replacing it in what clients get


class RequestIdRewriter:
    """Replaces one id in one body. Feed the pieces in order, then :meth:`end`.

    Attributes:
        internal, public: what is replaced, and by what. Empty where there is nothing to hide.
        held: a tail that waits for its rest. While there is none, replacing is all that :meth:`feed` does to a piece
            of whole lines.
    """

    __slots__ = ("held", "internal", "public")

    def __init__(self, request_id: RequestId) -> None:
        self.internal = request_id.internal.encode()
        self.public = request_id.public.encode()
        self.held = b""

    def feed(self, piece: bytes) -> bytes:
        """What may be passed on now; may be empty."""
        data = self.held + piece if self.held else piece
        data = data.replace(self.internal, self.public)
        if data.endswith(b"\n"):
            # As whole events do; no beginning of an id does.
            self.held = b""
            return data
        cut = self._undecided(data)
        self.held = data[cut:]
        return data[:cut]

    def end(self) -> bytes:
        """What was held back and turned out to be no id."""
        held, self.held = self.held, b""
        return held

    def _undecided(self, data: bytes) -> int:
        """Where a tail that is a beginning of the id starts; the length of ``data`` when there is none."""
        start = max(0, len(data) - len(self.internal) + 1)
        first = self.internal[:1]
        start = data.find(first, start)
        while start >= 0:
            if self.internal.startswith(data[start:]):
                return start
            start = data.find(first, start + 1)
        return len(data)


class NoRewriting(RequestIdRewriter):
    """For a body in which no internal id can be."""

    __slots__ = ()

    def __init__(self) -> None:
        self.internal = self.public = self.held = b""

    def feed(self, piece: bytes) -> bytes:
        """All of it."""
        return piece

    def end(self) -> bytes:
        """Nothing."""
        return b""


def hide(request_id: RequestId, text: bytes) -> bytes:
    """Replace the id in a whole body or header value."""
    return text.replace(request_id.internal.encode(), request_id.public.encode())
