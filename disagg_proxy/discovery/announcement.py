"""The text of a ping, and nothing else: msgpack in, a typed announcement out.

vLLM 0.9.2 - 0.23 (``kv_connector/v1/p2p/p2p_nccl_engine.py``, ``ping``): every 3 s a DEALER sends
``{"type": "P" | "D", "http_address": "host:port", "zmq_address": "host:port"}``. This project's connector sends the
same and more (docs/connector.md, "Announcement").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgpack

from disagg_proxy.address import Address, parse_address
from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.kv_kind import DISAGG_KV, P2P, P2P_NCCL, KvKind
from disagg_proxy.connectors.disagg_kv_params import FIELDS, OPTIONAL

MAX_BYTES = 4096
"""A real ping has about 100 bytes."""

PASSED_ON = "passed_on"
"""The mark of a ping that another proxy passes on; whatever its value."""

_ROLES = {"P": Role.PREFILL, "D": Role.DECODE}


class BadAnnouncement(Exception):
    """A message that is no ping; ``kind`` is the word it is counted under."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Announcement:
    """One ping: an instance with this role serves HTTP and KV at these addresses.

    Attributes:
        boot: differs for every process of an engine; empty where the connector tells nothing of it.
        passed_on: another proxy has got it and passes it on (discovery/forward.py).
        raw: the message as it came.
    """

    role: Role
    http: Address
    kv: Address
    kind: KvKind = P2P
    boot: str = ""
    passed_on: bool = False
    raw: bytes = field(default=b"", compare=False, repr=False)


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
    addresses = _address(fields, "http_address"), _address(fields, "zmq_address")
    return Announcement(
        _ROLES[role], *addresses, _kind(fields), _boot(fields), passed_on=PASSED_ON in fields, raw=payload
    )


def passed_on(announcement: Announcement) -> bytes:
    """The message for another proxy: the same, marked."""
    fields = msgpack.unpackb(announcement.raw)
    return bytes(msgpack.packb({**fields, PASSED_ON: True}))


def _kind(fields: dict[object, object]) -> KvKind:
    protocol = fields.get("protocol", P2P_NCCL)
    if protocol == P2P_NCCL:
        return P2P
    if protocol != DISAGG_KV:
        raise BadAnnouncement("mistyped", f"the KV protocol {str(protocol)[:40]!r} is not known here")
    traits: list[tuple[str, str | int]] = []
    for name in (*FIELDS, *(name for name in OPTIONAL if name in fields)):
        value = fields.get(name)
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise BadAnnouncement("mistyped", f"{name} is neither text nor a number")
        traits.append((name, value))
    transports = fields.get("transports")
    if not isinstance(transports, list) or not all(isinstance(name, str) for name in transports):
        raise BadAnnouncement("mistyped", "transports is no list of texts")
    return KvKind(DISAGG_KV, tuple(traits), frozenset(transports))


def _boot(fields: dict[object, object]) -> str:
    boot = fields.get("boot_id", "")
    if not isinstance(boot, str):
        raise BadAnnouncement("mistyped", "boot_id is not text")
    return boot


def _address(fields: dict[object, object], name: str) -> Address:
    text = fields.get(name)
    if not isinstance(text, str):
        raise BadAnnouncement("mistyped", f"{name} is not text")
    try:
        return parse_address(text)
    except ValueError as error:
        raise BadAnnouncement("mistyped", f"{name}: {error}") from None
