"""The KV transfer protocols that the proxy speaks. A new one is a file of this folder and a line here."""

from __future__ import annotations

from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.config import Config, ConfigError
from disagg_proxy.connectors import disagg_kv, moriio, nixl, p2p_nccl
from disagg_proxy.connectors.base import Announced, Connector, Engines, Fields, KvProtocol, never_announced

PROTOCOLS: tuple[KvProtocol, ...] = (
    disagg_kv.PROTOCOL,
    moriio.PROTOCOL,
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


def check_instances(config: Config) -> None:
    """Check the protocols of the engines that PREFILL_INSTANCES and DECODE_INSTANCES name.

    Raises:
        ConfigError: one is not known, or its engines announce themselves with what the proxy must know of them.
    """
    known = [protocol.kind.protocol for protocol in PROTOCOLS if protocol.read is never_announced]
    for env, named in (("PREFILL_INSTANCES", config.prefill), ("DECODE_INSTANCES", config.decode)):
        for instance in named:
            if instance.protocol is not None and instance.protocol not in known:
                raise ConfigError(
                    f"{env}: must name a KV protocol of engines that do not ping ({', '.join(known)}) or a KV address, "
                    f"not {instance.protocol!r}"
                )


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
