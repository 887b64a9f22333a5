"""Bytes of KV cache that one prompt token takes, from a model's config.json: kv_bytes.py MODEL [DTYPE]. 0 if unknown.

2 (keys and values) x layers x KV heads x head size x bytes of the data type; models with latent attention keep one
vector a layer (kv_lora_rank + qk_rope_head_dim). MODEL is a directory, or a name in the local Hugging Face cache.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def find_config(model: str) -> Path | None:
    """The model's config.json, None when it is not on this machine."""
    direct = Path(model) / "config.json"
    if direct.is_file():
        return direct
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    found = sorted(hub.glob(f"models--{model.replace('/', '--')}/snapshots/*/config.json"))
    return found[-1] if found else None


def bytes_per_token(config: dict[str, Any], dtype: str) -> int:
    """For one token on all GPUs of an engine together."""
    text = config.get("text_config")
    shape = text if isinstance(text, dict) else config
    # vLLM computes in 16 bits unless it is told otherwise; it casts float32 models.
    width = 4 if dtype in ("float", "float32") else 2
    layers = int(shape["num_hidden_layers"])
    if shape.get("kv_lora_rank"):
        return layers * (int(shape["kv_lora_rank"]) + int(shape["qk_rope_head_dim"])) * width
    heads = int(shape["num_attention_heads"])
    kv_heads = int(shape.get("num_key_value_heads") or heads)
    head_size = int(shape.get("head_dim") or int(shape["hidden_size"]) // heads)
    return 2 * layers * kv_heads * head_size * width


def main(model: str, dtype: str = "auto") -> int:
    """The figure for a model, 0 when its configuration is not here or says too little."""
    path = find_config(model)
    if path is None:
        return 0
    try:
        return bytes_per_token(json.loads(path.read_text(encoding="utf-8")), dtype)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError):
        return 0


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
