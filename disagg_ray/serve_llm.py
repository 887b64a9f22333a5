"""This project's KV connector in Ray Serve LLM: a backend for ``build_pd_openai_app``, which P2P NCCL needs no UCX for.

:func:`register` in the program that builds the application is all that is needed:

    from disagg_ray import serve_llm
    from ray.serve.llm import build_pd_openai_app

    serve_llm.register()
    serve.run(build_pd_openai_app({"prefill_config": ..., "decode_config": ...}))

Both configurations have ``kv_transfer_config: {"kv_connector": "DisaggKVConnector", "kv_role": ...}``, decode with
``"kv_load_failure_policy": "recompute"``. Here Ray's decode replica sends the request to a prefill replica, and what it
does with failures is Ray's: the error of a failed prefill is the client's. The proxy of this project is not involved.

The interface is ``ray/llm/_internal/serve/engines/vllm/kv_transfer/{factory,base}.py`` of Ray 2.60. It is internal, so
another release may change it; what is used of it is checked by :func:`register`.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

import ray

from disagg_kv.ports import PortBlock, PortRange, hold_block
from disagg_kv.protocol.keys import join_address

CONNECTOR = "DisaggKVConnector"
MODULE = "disagg_kv.connector"
OLDEST = (2, 60)
"""The release whose interface this was written for."""

PORTS_KEY = "DISAGG_KV_PORTS"
"""Key of ``experimental_configs``: the range from which each replica takes its KV ports."""
DEFAULT_PORTS = "21000-22999"
ADDRESS_KEY = "disagg_kv_address"
"""In a prefill replica's metadata: the KV address of its engine."""

_USED = ("prepare_prefill_request", "prepare_decode_request", "replica_metadata", "setup", "kv_transfer_config")


class UnsupportedRay(RuntimeError):
    """Ray has no interface for this backend; the text says which release has it."""


def _check_version(text: str) -> None:
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None or (int(match[1]), int(match[2])) < OLDEST:
        raise UnsupportedRay(
            f"Ray {text} is too old for {CONNECTOR} in Ray Serve LLM: install ray[llm]==2.60.0 or newer"
        )


_check_version(ray.__version__)
try:
    from ray.llm._internal.serve.engines.vllm.kv_transfer.base import (
        BaseConnectorBackend,
        clamp_request_to_single_token,
    )
    from ray.llm._internal.serve.engines.vllm.kv_transfer.factory import KVConnectorBackendFactory
except ImportError as error:
    raise UnsupportedRay(
        f"Ray {ray.__version__} has no backends for KV connectors where 2.60 has them, or lacks a package ({error}): "
        "install ray[llm]==2.60.0"
    ) from error

_held: list[PortBlock] = []
"""Blocks of this process, until it ends. Not in the backend: Ray copies the configuration that has it."""


class DisaggKVBackend(BaseConnectorBackend):
    """Prefill and decode start at the same time; decode waits for KV from the address that prefill's replica has."""

    requires_peer_binding = True
    concurrent_handoff = True

    _address = ""

    def setup(self) -> None:
        """Complete ``kv_transfer_config`` of this replica: address, ports, where the connector's class is.

        Raises:
            ValueError: the engine's ranks may be spread over nodes, or ``kv_role`` is missing.
            OSError: the range of ports has no free block.
        """
        config, ranks = self.kv_transfer_config, self._ranks()
        if config.get("kv_role") not in ("kv_producer", "kv_consumer", "kv_both"):
            raise ValueError(
                f"kv_transfer_config of {CONNECTOR}: set kv_role to kv_producer (prefill) or kv_consumer (decode)"
            )
        placement = self.llm_config.placement_group_config or {}
        if ranks > 1 and placement.get("strategy") != "STRICT_PACK":
            raise ValueError(
                f"{CONNECTOR} needs the {ranks} ranks of an engine on one node: set placement_group_config to "
                '{"bundles": [{"GPU": 1}] * tensor_parallel_size, "strategy": "STRICT_PACK"}'
            )
        ports = PortRange.parse(str(self.llm_config.experimental_configs.get(PORTS_KEY, DEFAULT_PORTS)))
        # Not vLLM's choice of an address, which may be one that other nodes cannot reach.
        host = ray.util.get_node_ip_address()
        block = hold_block(ports, ranks, host, f"experimental_configs[{PORTS_KEY!r}]")
        _held.append(block)
        config.setdefault("kv_connector_module_path", MODULE)
        config["kv_port"] = block.first
        if config["kv_role"] != "kv_producer":
            config.setdefault("kv_load_failure_policy", "recompute")
        config.setdefault("kv_connector_extra_config", {})["host_ip"] = host
        self._address = join_address(host, block.first)

    def _ranks(self) -> int:
        return int(self.llm_config.engine_kwargs.get("tensor_parallel_size") or 1)

    def replica_metadata(self) -> dict[str, Any]:
        """The KV address of this replica's engine."""
        return {ADDRESS_KEY: self._address}

    def prepare_prefill_request(self, *, request: Any, peer: dict[str, Any] | None) -> Any:
        """The request for prefill: one token. ``request`` gets the transfer id, which decode's copy has too.

        Ray calls it before :meth:`prepare_decode_request` with the same object. What a client has put into
        ``kv_transfer_params`` is replaced: ids must be new and unguessable (docs/connector.md).
        """
        request.kv_transfer_params = {"transfer_id": secrets.token_hex(16)}
        prefill = request.model_copy(deep=True)
        clamp_request_to_single_token(prefill)
        # Ray's clamp leaves what contradicts max_tokens=1; vLLM would refuse it.
        for name, value in (("min_tokens", 0), ("n", 1)):
            if getattr(prefill, name, None) is not None:
                setattr(prefill, name, value)
        return prefill

    def prepare_decode_request(self, *, request: Any, peer: dict[str, Any] | None, prefill_response: Any) -> Any:
        """The request for decode, with the address of the chosen prefill replica.

        Raises:
            ValueError: that replica has published no address.
        """
        address = (peer or {}).get(ADDRESS_KEY)
        if not address:
            raise ValueError(f"the prefill replica has no KV address: is its kv_connector {CONNECTOR}?")
        decode = request.model_copy(deep=True)
        decode.kv_transfer_params = {**request.kv_transfer_params, "from": address}
        return decode


def register() -> None:
    """Make the backend known to every process of the Ray cluster. May be repeated.

    Raises:
        UnsupportedRay: the interface is another one than that of Ray 2.60.
    """
    missing = [name for name in _USED if not hasattr(BaseConnectorBackend, name)]
    missing += [
        name for name in ("requires_peer_binding", "concurrent_handoff") if not hasattr(BaseConnectorBackend, name)
    ]
    if missing:
        raise UnsupportedRay(
            f"Ray {ray.__version__}: BaseConnectorBackend has no {', '.join(missing)}: use ray[llm]==2.60.0"
        )
    if not KVConnectorBackendFactory.is_registered(CONNECTOR):
        KVConnectorBackendFactory.register_backend(CONNECTOR, f"{__name__}:{DisaggKVBackend.__name__}")
