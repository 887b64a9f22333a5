"""Writes small models and adapters as vLLM reads them, without numpy and safetensors."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONFIG = {"model_type": "qwen3", "num_hidden_layers": 2, "rope_theta": 10000.0, "_name_or_path": "/somewhere"}
NAMES = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight")


def tensors(seed: int = 0, size: int = 3000, names: tuple[str, ...] = NAMES) -> dict[str, bytes]:
    """Random bytes by name."""
    return {name: random.Random(f"{seed} {name}").randbytes(size) for name in names}


def write(path: Path, found: Mapping[str, bytes], dtype: str = "BF16", **metadata: str) -> None:
    """A safetensors file: 8 bytes of length, a JSON object, the data."""
    head: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, data in found.items():
        head[name] = {"dtype": dtype, "shape": [len(data) // 2], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(found.values()))


def model(folder: Path, found: Mapping[str, bytes] | None = None, config: Mapping[str, Any] = CONFIG) -> Path:
    """A folder with a model of one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write(folder / "model.safetensors", tensors() if found is None else found)
    return folder


def lora(folder: Path, seed: int = 0, name: str = "l", number: int = 1) -> Any:
    """A request's ``lora_request``; the adapter is in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    write(folder / "adapter_model.safetensors", tensors(seed, 100, ("q_proj.lora_A.weight",)))
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=str(folder))


def engine_config(path: Path | str, **changes: Any) -> Any:
    """A ``VllmConfig`` of these fields of its parts (``hf_overrides``, ``load_format``, ``cache_dtype``...)."""
    parts: dict[str, dict[str, Any]] = {
        "model_config": {
            "model": str(path), "revision": None, "hf_config_path": None, "quantization": None, "hf_overrides": {},
            "dtype": "torch.bfloat16", "max_model_len": 1024, "hf_text_config": SimpleNamespace(),
            "is_multimodal_model": False,
        },
        "load_config": {"load_format": "auto", "download_dir": None},
        "cache_config": {"cache_dtype": "auto"},
    }  # fmt: skip
    for name, value in changes.items():
        next(fields for fields in parts.values() if name in fields)[name] = value
    return SimpleNamespace(**{name: SimpleNamespace(**fields) for name, fields in parts.items()})
