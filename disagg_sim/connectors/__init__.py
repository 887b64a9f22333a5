"""KV transfer of a simulated engine: one connector for each name that ``SimConfig.connector`` can have."""

from __future__ import annotations

from collections.abc import Callable

from disagg_sim.config import Connector, SimConfig
from disagg_sim.connectors.base import KvConnector
from disagg_sim.connectors.disagg_kv import DisaggKv
from disagg_sim.connectors.moriio import Moriio
from disagg_sim.connectors.nixl import Nixl
from disagg_sim.connectors.p2p_nccl import P2pNccl
from disagg_sim.faults import Faults

_CONNECTORS: dict[Connector, Callable[[SimConfig, Faults, str, Callable[[], None]], KvConnector]] = {
    "p2p_nccl": P2pNccl,
    "disagg_kv": DisaggKv,
    "nixl": Nixl,
    "moriio": Moriio,
}


def make_connector(config: SimConfig, faults: Faults, kv_address: str, changed: Callable[[], None]) -> KvConnector:
    """The connector that ``config`` names.

    Args:
        kv_address: ``host:port`` of the engine's KV port.
        changed: called after every change of the connector's state.
    """
    return _CONNECTORS[config.connector](config, faults, kv_address, changed)
