"""Hiding the internal request id in a body that arrives in pieces.

One pass over the bytes, no JSON and no SSE framing. An id may be split over two reads, so a tail that could be the
beginning of one is held back until the next piece decides it.
"""

from __future__ import annotations

from disagg_proxy.request_id import RequestId


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
