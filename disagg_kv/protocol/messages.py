"""Messages after the handshake. Every value from the other side is checked here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from disagg_kv.protocol.frames import Kind, WireError, encode
from disagg_kv.protocol.keys import Key, transfer_id

_MAX_BLOCKS = 1 << 24
_MAX_TAILS = 256
PING, PONG = encode(Kind.PING, {}), encode(Kind.PONG, {})
PINGS = "ping"
"""Field of WELCOME, true: this prefill engine answers PING. Older ones close the connection instead."""


def _number(body: dict[str, Any], name: str, low: int, high: int) -> int:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise WireError(f"{name} is not an integer from {low} to {high}")
    return value


def _reason(body: dict[str, Any]) -> str:
    value = body.get("reason")
    return value[:200] if isinstance(value, str) else ""


@dataclass(frozen=True)
class Want:
    """Decode requests blocks ``first`` to ``first + count - 1`` of the prompt, in the order of ``engine/groups.py``."""

    key: Key
    first: int
    count: int
    adapter: str = ""
    """Digest of the prompt's LoRA adapter, "" without one. Older releases ignore it."""
    tails: tuple[int, ...] = ()
    """How many of the last blocks are of each tail, if there are tails. Older releases have no such caches."""

    def encode(self) -> bytes:
        more: dict[str, Any] = {"adapter": self.adapter} if self.adapter else {}
        if self.tails:
            more["tails"] = list(self.tails)
        return encode(Kind.WANT, {**self.key.to_wire(), "first": self.first, "count": self.count, **more})

    @classmethod
    def decode(cls, body: dict[str, Any]) -> Want:
        adapter = body.get("adapter", "")
        if not isinstance(adapter, str) or len(adapter) > 64:
            raise WireError("not the digest of an adapter")
        first, count = _number(body, "first", 0, _MAX_BLOCKS), _number(body, "count", 1, _MAX_BLOCKS)
        tails = body.get("tails", [])
        if not isinstance(tails, list) or len(tails) > _MAX_TAILS:
            raise WireError("not the lengths of tails")
        lengths = tuple(_number({"tails": length}, "tails", 0, count) for length in tails)
        if sum(lengths) > count:
            raise WireError("tails of more blocks than are requested")
        return cls(Key.from_wire(body), first, count, adapter, lengths)


@dataclass(frozen=True)
class Release:
    """A key (from decode) or a complete transfer (``key`` None, from the proxy) is no longer needed."""

    transfer: str
    key: Key | None = None

    def encode(self) -> bytes:
        return encode(Kind.RELEASE, self.key.to_wire() if self.key else {"t": self.transfer})

    @classmethod
    def decode(cls, body: dict[str, Any]) -> Release:
        if "p" in body:
            key = Key.from_wire(body)
            return cls(key.transfer, key)
        return cls(transfer_id(body.get("t")))


@dataclass(frozen=True)
class Go:
    """Prefill sends blocks ``first`` to ``first + count - 1`` now.

    Attributes:
        last: no more blocks of this key follow.
        parts: the blocks are still being computed, layer by layer.
    """

    key: Key
    first: int
    count: int
    last: bool
    parts: bool = False

    def encode(self) -> bytes:
        body = {**self.key.to_wire(), "first": self.first, "count": self.count, "last": self.last, "parts": self.parts}
        return encode(Kind.GO, body)

    @classmethod
    def decode(cls, body: dict[str, Any]) -> Go:
        return cls(
            Key.from_wire(body),
            _number(body, "first", 0, _MAX_BLOCKS),
            _number(body, "count", 1, _MAX_BLOCKS),
            body.get("last") is True,
            body.get("parts") is True,
        )


@dataclass(frozen=True)
class Gone:
    """Prefill will not send this key (any more): decode has to compute the prompt."""

    key: Key
    reason: str

    def encode(self) -> bytes:
        return encode(Kind.GONE, {**self.key.to_wire(), "reason": self.reason[:200]})

    @classmethod
    def decode(cls, body: dict[str, Any]) -> Gone:
        return cls(Key.from_wire(body), _reason(body))
