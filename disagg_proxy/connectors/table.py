"""The KV transfer protocols that the proxy speaks. A new one is a file of this folder and a line here."""

from __future__ import annotations

from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.connectors import disagg_kv, nixl, p2p_nccl
from disagg_proxy.connectors.base import Announced, Connector, Engines, Fields, KvProtocol

PROTOCOLS: tuple[KvProtocol, ...] = (
    disagg_kv.PROTOCOL,
    nixl.PROTOCOL,
    # Last: its announcements name no protocol, so it reads what no other one has claimed.
    p2p_nccl.PROTOCOL,
)
"""In the order in which they see an announcement."""

UNANNOUNCED = p2p_nccl.KIND.protocol
"""Protocol of an engine that is named in the configuration without one, until it announces another."""


def connectors(engines: Engines) -> dict[str, Connector]:
    """A connector for each protocol, by its name."""
    return {protocol.kind.protocol: protocol.connector(engines) for protocol in PROTOCOLS}


def kind_named(protocol: str | None) -> KvKind:
    """The kind of an engine in the configuration that has announced nothing yet.

    Args:
        protocol: as the configuration names it, None where it does not.
    """
    name = protocol or UNANNOUNCED
    return next(known.kind for known in PROTOCOLS if known.kind.protocol == name)


def read_announcement(fields: Fields) -> Announced:
    """What an announcement says of its engine's KV.

    Raises:
        ValueError: no protocol here knows it, or a field is wrong.
    """
    for protocol in PROTOCOLS:
        announced = protocol.read(fields)
        if announced is not None:
            return announced
    raise ValueError(f"the KV protocol {str(fields.get('protocol'))[:40]!r} is not known here")
