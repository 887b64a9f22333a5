"""Which models this connector cannot serve, as far as their config.json tells. Pure: no vLLM, no torch.

The cache itself is checked when vLLM has made it (``engine/layout.py``), which is after the weights are loaded. What is
refused here is certain to be refused there, or to fail in vLLM before (0.32, v1/core/kv_cache_utils.py,
``unify_hybrid_kv_cache_specs``), so a model that is not known here is not refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_RECURRENT_LAYERS = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid"})
"""Values of ``layer_types``, ``layers_block_type`` and ``block_types`` that keep a state besides or instead of KV."""
_RECURRENT_MODELS = frozenset(
    {"bamba", "falcon_h1", "falcon_mamba", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba", "mamba2",
     "minimax_text_01", "nemotron_h", "plamo2", "qwen3_next", "zamba2"}
)  # fmt: skip
"""``model_type`` of models whose layers of that kind need not be listed in their configuration."""
_OTHER_LAYERS = frozenset({"conv", "recurrent"})
_OTHER_MODELS = frozenset(
    {"falcon_mamba", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba", "mamba2", "minimax_text_01", "qwen3_5",
     "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"}
)  # fmt: skip
"""Those whose state is not Mamba-2's, all that ``engine/groups.py`` accepts, or that have no attention. The kind
``linear_attention`` does not tell: transformers 5.19 calls Granite-4's Mamba-2 layers so too."""
_SLIDING_MODELS = frozenset({"mistral", "mixtral"})
"""``model_type`` of models of which every layer slides if there is a window and no list of layers."""


def unsupported(config: Mapping[str, Any], *, states: bool = False) -> str:
    """Return why this connector cannot move the KV of a model, "" where the configuration does not tell.

    Args:
        config: the fields of config.json; those of a multimodal model's ``text_config`` count.
        states: this vLLM lets the connector move recurrent states (0.32 and newer).
    """
    text = config.get("text_config")
    fields = text if isinstance(text, Mapping) else config
    if config.get("is_encoder_decoder") is True:
        return "it is an encoder-decoder model, whose cross attention has a cache of its own"
    kinds, model = _layer_kinds(fields), fields.get("model_type")
    others = sorted(set(kinds) & _OTHER_LAYERS)
    if others or model in _OTHER_MODELS:
        what = f"layers of kind {', '.join(others)} keep" if others else f"a model of type {model} keeps"
        return f"{what} a recurrent state that cannot be moved (only Mamba-2's can)"
    if not states:
        if recurrent := sorted(set(kinds) & _RECURRENT_LAYERS):
            return f"layers of kind {', '.join(recurrent)} keep a recurrent state, which needs vLLM 0.32 or newer"
        if not kinds and model in _RECURRENT_MODELS:
            return f"a model of type {model} keeps a recurrent state, which needs vLLM 0.32 or newer"
    if fields.get("index_topk"):
        return "it has sparse attention with an indexer (index_topk), whose cache cannot be moved"
    return ""


def every_layer_slides(config: Mapping[str, Any]) -> bool:
    """Whether vLLM frees blocks of a prompt while it is computed, unless ``--disable-sliding-window`` is set."""
    text = config.get("text_config")
    fields = text if isinstance(text, Mapping) else config
    if not fields.get("sliding_window"):
        return False
    kinds = _layer_kinds(fields)
    return set(kinds) == {"sliding_attention"} if kinds else fields.get("model_type") in _SLIDING_MODELS


def _layer_kinds(fields: Mapping[str, Any]) -> Sequence[str]:
    for name in ("layer_types", "layers_block_type", "block_types"):
        kinds = fields.get(name)
        if isinstance(kinds, Sequence) and kinds and all(isinstance(kind, str) for kind in kinds):
            return kinds
    return ()
