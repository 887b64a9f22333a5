"""What a model's config.json tells of its KV: bytes of one prompt token, and whether the connector can move it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from disagg_kv.model_config import every_layer_slides, unsupported


def find_config(model: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The config.json of a model; None when it is not on this machine.

    ``model``: a folder, or a name in the local Hugging Face cache.
    """
    direct = Path(model) / "config.json"
    if direct.is_file():
        return direct
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(environ.get("HF_HUB_CACHE") or home / "hub")
    found = sorted(hub.glob(f"models--{model.replace('/', '--')}/snapshots/*/config.json"))
    return found[-1] if found else None


def bytes_per_token(config: dict[str, Any], dtype: str) -> int:
    """Bytes of KV cache for one token, on all GPUs of an engine together.

    2 (keys and values) x layers x KV heads x head size x bytes of the data type; models with latent attention keep one
    vector a layer (kv_lora_rank + qk_rope_head_dim).
    """
    text = config.get("text_config")
    shape = text if isinstance(text, dict) else config
    # vLLM computes in 16 bits unless another type is set; it casts float32 models.
    width = 4 if dtype in ("float", "float32") else 2
    layers = int(shape["num_hidden_layers"])
    if shape.get("kv_lora_rank"):
        return layers * (int(shape["kv_lora_rank"]) + int(shape["qk_rope_head_dim"])) * width
    heads = int(shape["num_attention_heads"])
    kv_heads = int(shape.get("num_key_value_heads") or heads)
    head_size = int(shape.get("head_dim") or int(shape["hidden_size"]) // heads)
    return 2 * layers * kv_heads * head_size * width


def why_unsupported(
    model: str,
    arguments: str = "",
    environ: Mapping[str, str] = os.environ,
    *,
    all_sliding: bool = False,
    states: bool = False,
) -> str:
    """Why this project's connector cannot move the KV of a model; "" when it can, or its config.json does not tell.

    Args:
        arguments: of the engines, in one line.
        all_sliding: models of which every layer has a sliding window can be served (vLLM 0.30 and newer).
        states: models with recurrent states can (vLLM 0.32 and newer).
    """
    path = find_config(model, environ)
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return ""
    if not isinstance(config, dict):
        return ""
    if not all_sliding and every_layer_slides(config) and "--disable-sliding-window" not in arguments:
        return ("every layer has a sliding window, which needs vLLM 0.30 or newer "
                "(or EXTRA_PREFILL_ARGS and EXTRA_DECODE_ARGS: --disable-sliding-window)")  # fmt: skip
    return unsupported(config, states=states)


def kv_bytes_per_token(model: str, dtype: str = "auto", environ: Mapping[str, str] = os.environ) -> int:
    """:func:`bytes_per_token` of a model; 0 when its configuration is not on this machine or says too little."""
    path = find_config(model, environ)
    if path is None:
        return 0
    try:
        return bytes_per_token(json.loads(path.read_text(encoding="utf-8")), dtype)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError):
        return 0
