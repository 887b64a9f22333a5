"""Reads announcements (pings): msgpack in, a typed announcement out.

vLLM 0.9.2 - 0.23 (``kv_connector/v1/p2p/p2p_nccl_engine.py``, ``ping``): every 3 s a DEALER sends
``{"type": "P" | "D", "http_address": "host:port", "zmq_address": "host:port"}``. Role and HTTP address are read here,
the rest by the KV protocol that recognizes it (``connectors/table.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from disagg_power.report import GpuReport, unpacked
from disagg_proxy.address import Address
from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.connectors.base import address_field
from disagg_proxy.connectors.table import read_announcement

MAX_BYTES = 4096
"""A real ping has about 100 bytes."""

PASSED_ON = "passed_on"
"""Field of a ping that another proxy passes on; its value does not matter."""

_ROLES = {"P": Role.PREFILL, "D": Role.DECODE}


class BadAnnouncement(Exception):
    """A message that is not a valid ping; ``kind`` is the name it is counted under."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Announcement:
    """One ping: an instance with this role serves HTTP and KV at these addresses.

    Attributes:
        boot: differs for every process of an engine; empty where the connector does not announce it.
        links: on decode, transport of each open connection to a prefill, by its KV address.
        gpus: what the engine reports of its GPUs; empty where it does not.
        passed_on: another proxy received it and passes it on (discovery/forward.py).
        provable: the engine's KV port can prove it (discovery/proof.py).
        unproven: it counts only once it is proven.
        sender: address that it came from.
        raw: the message as received.
    """

    role: Role
    http: Address
    kv: Address
    kind: KvKind
    boot: str = ""
    links: tuple[tuple[str, str], ...] = ()
    gpus: tuple[GpuReport, ...] = ()
    passed_on: bool = False
    provable: bool = False
    unproven: bool = False
    sender: str = field(default="", compare=False)
    raw: bytes = field(default=b"", compare=False, repr=False)

    @property
    def key(self) -> tuple[str, ...]:
        """Newer announcements replace older ones with this key. An unproven one must not replace the engine's own."""
        endpoint = (self.http.netloc, self.kv.text)
        return (*endpoint, self.sender) if self.unproven else endpoint


def decode(frames: Sequence[bytes]) -> Announcement:
    """Read the frames of one message; an empty one may come first, as REQ sockets send it.

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
    try:
        http, kv = address_field(fields, "http_address"), read_announcement(fields)
    except ValueError as error:
        raise BadAnnouncement("mistyped", str(error)) from None
    return Announcement(
        _ROLES[role], http, kv.kv, kv.kind, kv.boot, kv.links,
        gpus=unpacked(fields.get("power")), passed_on=PASSED_ON in fields, provable=kv.provable, raw=payload,
    )  # fmt: skip


def fields_of(announcement: Announcement) -> dict[str, Any]:
    """The fields as the engine sent them, without the mark of another proxy."""
    fields = msgpack.unpackb(announcement.raw)
    fields.pop(PASSED_ON, None)
    return {str(name): value for name, value in fields.items()}


def passed_on(announcement: Announcement) -> bytes:
    """The message for another proxy: the same, marked."""
    fields = msgpack.unpackb(announcement.raw)
    return bytes(msgpack.packb({**fields, PASSED_ON: True}))
