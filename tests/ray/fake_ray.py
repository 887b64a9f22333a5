"""The part of Ray that disagg_ray.serve_llm uses, for environments without Ray.

Written after ray/llm/_internal/serve/engines/vllm/kv_transfer/{base,factory}.py of Ray 2.60.0: the same names,
arguments and class attributes, and nothing behind them.
"""

from __future__ import annotations

import abc
import sys
from types import ModuleType
from typing import Any

import pytest

BASE = "ray.llm._internal.serve.engines.vllm.kv_transfer.base"
FACTORY = "ray.llm._internal.serve.engines.vllm.kv_transfer.factory"
NODE_IP = "127.0.0.1"


class BaseConnectorBackend(abc.ABC):
    requires_peer_binding: bool = False
    concurrent_handoff: bool = False

    def __init__(self, llm_config: Any) -> None:
        self.llm_config = llm_config

    @property
    def kv_transfer_config(self) -> dict[str, Any]:
        found = self.llm_config.engine_kwargs.get("kv_transfer_config")
        assert found is not None
        return found

    @abc.abstractmethod
    def prepare_prefill_request(self, *, request: Any, peer: Any) -> Any: ...

    @abc.abstractmethod
    def prepare_decode_request(self, *, request: Any, peer: Any, prefill_response: Any) -> Any: ...

    def setup(self) -> None:
        return None

    def replica_metadata(self) -> dict[str, Any]:
        return {}


def clamp_request_to_single_token(request: Any) -> None:
    request.max_tokens = 1
    if hasattr(request, "max_completion_tokens"):
        request.max_completion_tokens = 1
    request.stream = False
    if hasattr(request, "stream_options"):
        request.stream_options = None


def install(patch: pytest.MonkeyPatch, version: str = "2.60.0", without: str = "") -> dict[str, Any]:
    """Put it into sys.modules; returns what is registered.

    Args:
        without: a name that BaseConnectorBackend does not have, or the full name of a module that is not there.
    """
    registered: dict[str, Any] = {}

    class Factory:
        @classmethod
        def register_backend(cls, name: str, path: Any) -> None:
            assert name not in registered, "Ray raises ValueError"
            registered[name] = path

        @classmethod
        def is_registered(cls, name: str) -> bool:
            return name in registered

    kept = {name: one for name, one in vars(BaseConnectorBackend).items() if name != without and name[:2] != "__"}
    base = abc.ABCMeta("BaseConnectorBackend", (), {"__init__": BaseConnectorBackend.__init__, **kept})
    contents: dict[str, dict[str, Any]] = {BASE: {"BaseConnectorBackend": base}, FACTORY: {}}
    contents[BASE]["clamp_request_to_single_token"] = clamp_request_to_single_token
    contents[FACTORY]["KVConnectorBackendFactory"] = Factory
    for full in (BASE, FACTORY):
        parts = full.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            module = sys.modules.get(name) if end < len(parts) else None
            if module is None or not getattr(module, "__fake__", False):
                module = ModuleType(name)
                module.__fake__ = True  # type: ignore[attr-defined]
                module.__path__ = []
                patch.setitem(sys.modules, name, module)
    for name, values in contents.items():
        vars(sys.modules[name]).update(values)
    ray = sys.modules["ray"]
    ray.__version__ = version  # type: ignore[attr-defined]
    util = ModuleType("ray.util")
    util.get_node_ip_address = lambda: NODE_IP  # type: ignore[attr-defined]
    ray.util = util  # type: ignore[attr-defined]
    if without in contents:
        patch.setitem(sys.modules, without, None)
    return registered
