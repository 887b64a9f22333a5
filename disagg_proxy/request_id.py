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
    """The system's randomness, read in blocks of 4 KiB, which saves a system call for each id."""

    def __init__(self) -> None:
        self._pool = ""
        self._at = 0

    def hex(self, size: int) -> str:
        """``size`` random bytes as hexadecimal digits."""
        at, end = self._at, self._at + 2 * size
        if end > len(self._pool):
            self._pool = secrets.token_hex(4096 + size)
            at, end = 0, 2 * size
        self._at = end
        return self._pool[at:end]


_randomness = _Randomness()


def new_own_id() -> str:
    """The proxy's own id of one request: 32 random hexadecimal digits, the X-Request-Id of a client that sent none."""
    return _randomness.hex(16)


def new_request_id(prefill_kv: Address, decode_kv: Address, own_id: str = "") -> RequestId:
    """The id of one attempt, with both KV addresses, each as its instance announced it.

    Args:
        own_id: that of :func:`new_own_id` for the request; empty for a new one. The public id begins with it. The
            internal one ends in its first 24 digits and 8 others, so that each attempt has an id of its own, and the
            engines' logs can be searched for all of them.
    """
    own = own_id or new_own_id()
    head = f"{MARKERS[0]}{prefill_kv.text}{MARKERS[1]}{decode_kv.text}_"
    digits = _randomness.hex(4 + len(head) // 2 + 1)
    return RequestId(f"{head}{own[:24]}{digits[:8]}", own + digits[8 : 8 + len(head)])


# -- replacing the internal id in responses


class RequestIdRewriter:
    """Replaces the internal id in one streamed body, without parsing JSON or SSE. Feed its chunks in order, then call
    :meth:`end`. An id may be split over two chunks, so a tail that may be the beginning of one is held back.

    Attributes:
        internal, public: the id and its replacement; empty where there is nothing to replace.
        held: the tail that is held back. While it is empty, :meth:`feed` only replaces in a chunk of complete lines.
    """

    __slots__ = ("held", "internal", "public")

    def __init__(self, request_id: RequestId) -> None:
        self.internal = request_id.internal.encode()
        self.public = request_id.public.encode()
        self.held = b""

    def feed(self, chunk: bytes) -> bytes:
        """The bytes that can be sent now; may be empty."""
        data = self.held + chunk if self.held else chunk
        data = data.replace(self.internal, self.public)
        if data.endswith(b"\n"):
            # Complete events end so; a beginning of an id does not.
            self.held = b""
            return data
        cut = self._undecided(data)
        self.held = data[cut:]
        return data[:cut]

    def end(self) -> bytes:
        """The rest of the body that was held back."""
        held, self.held = self.held, b""
        return held

    def _undecided(self, data: bytes) -> int:
        """Offset of a tail that may be the beginning of the id; ``len(data)`` when there is none."""
        start = max(0, len(data) - len(self.internal) + 1)
        first = self.internal[:1]
        start = data.find(first, start)
        while start >= 0:
            if self.internal.startswith(data[start:]):
                return start
            start = data.find(first, start + 1)
        return len(data)


_EVENT_ENDS = (b"\n\n", b"\n\r\n")


class WholeEvents(RequestIdRewriter):
    """Passes only complete server-sent events, so that an error event can follow whatever has been sent.

    Args:
        inner: says what is replaced, if anything.
    """

    __slots__ = ()

    def __init__(self, inner: RequestIdRewriter) -> None:
        self.internal, self.public, self.held = inner.internal, inner.public, b""

    def feed(self, chunk: bytes) -> bytes:
        """The complete events; the beginning of the next one is held back. No id spans two events."""
        data = self.held + chunk if self.held else chunk
        cut = 0
        for end in _EVENT_ENDS:
            at = data.rfind(end)
            if at >= 0:
                cut = max(cut, at + len(end))
        self.held = data[cut:]
        data = data[:cut]
        return data.replace(self.internal, self.public) if self.internal else data

    def end(self) -> bytes:
        """The rest of the body that was held back."""
        held, self.held = self.held, b""
        return held.replace(self.internal, self.public) if self.internal else held


class NoRewriting(RequestIdRewriter):
    """For bodies without an internal id."""

    __slots__ = ()

    def __init__(self) -> None:
        self.internal = self.public = self.held = b""

    def feed(self, chunk: bytes) -> bytes:
        """The chunk itself."""
        return chunk

    def end(self) -> bytes:
        """Nothing is held back."""
        return b""


def hide(request_id: RequestId, text: bytes) -> bytes:
    """Replace the internal id in a complete body or a header value."""
    return text.replace(request_id.internal.encode(), request_id.public.encode())
