"""The text of a ping, and nothing else: msgpack in, a typed announcement out.

vLLM 0.9.2 - 0.23 (``kv_connector/v1/p2p/p2p_nccl_engine.py``, ``ping``): every 3 s a DEALER sends
``{"type": "P" | "D", "http_address": "host:port", "zmq_address": "host:port"}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgpack

from disagg_proxy.address import Address, parse_address
from disagg_proxy.cluster.instance import Role

MAX_BYTES = 4096
"""A real ping has about 100 bytes."""

_ROLES = {"P": Role.PREFILL, "D": Role.DECODE}


class BadAnnouncement(Exception):
    """A message that is no ping; ``kind`` is the word it is counted under."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Announcement:
    """One ping: an instance with this role serves HTTP and KV at these addresses."""

    role: Role
    http: Address
    kv: Address


def decode(frames: Sequence[bytes]) -> Announcement:
    """Read the frames of one message; an empty one may stand first, as in front of a request.

    Raises:
        BadAnnouncement: "oversized", "malformed" (not msgpack, not one frame) or "mistyped" (wrong fields).
    """
    payload = frames[-1] if frames else b""
    if sum(map(len, frames)) > MAX_BYTES:
        raise BadAnnouncement("oversized", f"{sum(map(len, frames))} bytes, at most {MAX_BYTES} are read")
    if not 1 <= len(frames) <= 2 or (len(frames) == 2 and frames[0]):
        raise BadAnnouncement("malformed", f"{len(frames)} frames")
    try:
        fields = msgpack.unpackb(payload)
    except Exception as error:  # msgpack raises half a dozen unrelated types
        raise BadAnnouncement("malformed", f"not msgpack: {type(error).__name__}") from None
    if not isinstance(fields, dict):
        raise BadAnnouncement("mistyped", f"a {type(fields).__name__} instead of a map")
    role = fields.get("type")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadAnnouncement("mistyped", "type is neither P nor D")
    return Announcement(_ROLES[role], _address(fields, "http_address"), _address(fields, "zmq_address"))


def _address(fields: dict[object, object], name: str) -> Address:
    text = fields.get(name)
    if not isinstance(text, str):
        raise BadAnnouncement("mistyped", f"{name} is not text")
    try:
        return parse_address(text)
    except ValueError as error:
        raise BadAnnouncement("mistyped", f"{name}: {error}") from None
