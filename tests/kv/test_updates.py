"""What is noticed of changes to a running engine's weights, with a stand-in for vLLM's ``EngineCore``."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from disagg_kv.engine.versions import watch_engine


class EngineCore:
    """The two methods, with the parameters of 0.32 (v1/engine/core.py)."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def collective_rpc(
        self, method: Any, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[str]:  # fmt: skip
        self.calls.append(method)
        return ["done"]

    def add_lora(self, lora_request: Any) -> bool:
        self.calls.append(lora_request)
        return True


class Subclass(EngineCore):
    """As ``EngineCoreProc``."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    module: Any = ModuleType("vllm.v1.engine.core")
    module.EngineCore = type("EngineCore", (), dict(EngineCore.__dict__))
    for name in ("vllm", "vllm.v1", "vllm.v1.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.core", module)
    made: EngineCore = type("EngineCoreProc", (module.EngineCore,), {})()
    return made


def change(model: Any) -> None:
    """What ``LLM.apply_model`` sends."""


def test_writes_are_known_before_they_happen(engine: EngineCore) -> None:
    seen: list[Any] = []
    watch_engine(lambda name: seen.append((name, list(engine.calls))), lambda lora: None)
    assert engine.collective_rpc("reload_weights", None, (), {"weights_path": "x"}) == ["done"]
    assert engine.collective_rpc(method="update_weights_from_ipc") == ["done"]
    engine.collective_rpc("apply_model", args=(change,))
    engine.collective_rpc(change)
    assert [name for name, _ in seen] == [
        "reload_weights", "update_weights_from_ipc", "apply_model", "function change",
    ]  # fmt: skip
    assert seen[0][1] == [] and seen[1][1] == ["reload_weights"]


@pytest.mark.parametrize(
    "method", ["update_max_model_len", "get_model", "compute_weight_checksums", "save_sharded_state", "check_health",
               "profile", "init_weight_transfer_engine"],
)  # fmt: skip
def test_calls_that_do_not_change_weights_are_no_writes(engine: EngineCore, method: str) -> None:
    seen: list[str] = []
    watch_engine(seen.append, lambda lora: None)
    assert engine.collective_rpc(method) == ["done"] and not seen


def test_adapters_are_known_once_they_are_loaded(engine: EngineCore) -> None:
    seen: list[Any] = []
    watch_engine(lambda name: None, lambda lora: seen.append((lora, list(engine.calls))))
    adapter = SimpleNamespace(lora_name="l")
    assert engine.add_lora(adapter) is True
    assert seen == [(adapter, [adapter])]


def test_only_the_newest_watcher_is_notified(engine: EngineCore) -> None:
    first: list[str] = []
    second: list[str] = []
    watch_engine(first.append, lambda lora: None)
    watch_engine(second.append, lambda lora: None)
    engine.collective_rpc("reload_weights")
    assert (first, second, engine.calls) == ([], ["reload_weights"], ["reload_weights"])
