"""Write a tiny model with random weights and a tokenizer: ``python tools/tiny_model.py FOLDER [FAMILY]``.

Runs in an environment with vLLM, whose torch, transformers and tokenizers it needs. The weights come from a fixed
seed, and the tokenizer knows bytes only and a few words, so the same versions write the same model.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
END, PAD = "<|im_end|>", "<|endoftext|>"
TEXT = __doc__ or ""
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% if add_generation_prompt %}assistant: {% endif %}"
)
WINDOW = 64
"""Tokens of a sliding window or of an attention chunk."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 4096, "tie_word_embeddings": True, "initializer_range": 0.05,
    "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
HEADS = {"num_key_value_heads": 2, "head_dim": 64}
SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", HEADS),
    "gpt-oss": (
        "GptOssConfig", "GptOssForCausalLM",
        {**HEADS, "sliding_window": WINDOW, "layer_types": [SLIDING, FULL] * 2, "num_local_experts": 4,
         "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
    "gemma-3": (
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        {**HEADS, "sliding_window": WINDOW, "num_hidden_layers": 6, "layer_types": [SLIDING] * 5 + [FULL],
         "query_pre_attn_scalar": 64},
    ),
    "mistral": (
        "MistralConfig", "MistralForCausalLM",
        {**HEADS, "sliding_window": WINDOW, "layer_types": [SLIDING, FULL] * 2},
    ),
    "mistral-sliding": ("MistralConfig", "MistralForCausalLM", {**HEADS, "sliding_window": WINDOW}),
    "llama-4": (
        "Llama4TextConfig", "Llama4ForCausalLM",
        {**HEADS, "attention_chunk_size": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1,
         "intermediate_size_mlp": 512, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 1, 0]},
    ),
    "deepseek-v2": (
        "DeepseekV2Config", "DeepseekV2ForCausalLM",
        {"num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 64,
         "qk_rope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 4, "n_shared_experts": 1,
         "num_experts_per_tok": 2, "moe_intermediate_size": 128, "first_k_dense_replace": 4, "n_group": 1,
         "topk_group": 1, "tie_word_embeddings": False},
    ),
    "granite-4": (
        "GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM",
        {"num_key_value_heads": 2, "layer_types": ["mamba"] * 3 + ["attention"], "mamba_n_heads": 8,
         "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1, "num_local_experts": 4,
         "num_experts_per_tok": 2, "shared_intermediate_size": 256, "position_embedding_type": "rope"},
    ),
    "falcon-h1": (
        "FalconH1Config", "FalconH1ForCausalLM",
        {**HEADS, "mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64,
         "mamba_n_groups": 1},
    ),
}  # fmt: skip
"""Configuration and model class of transformers, and fields besides ``SIZES``, by family."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and some for frequent pairs of them."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[PAD, END], initial_alphabet=alphabet)
    base.train_from_iterator([TEXT], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=base, eos_token=END, pad_token=PAD)
    made.chat_template = CHAT
    return made


def model(family: str) -> Any:
    """The last norm is scaled up, so that the logits differ enough for one clear choice a step."""
    torch.manual_seed(0)
    config_class, model_class, fields = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**SIZES, **fields})
    made = getattr(transformers, model_class)(config).to(torch.bfloat16)
    with torch.no_grad():
        norm = (made.model.final_layernorm if family == "falcon-h1" else made.model.norm).weight
        norm.mul_(4) if norm.any() else norm.add_(3)  # Gemma's norms multiply by 1 + weight.
    return made


if __name__ == "__main__":
    folder = sys.argv[1]
    tokenizer().save_pretrained(folder)
    model(sys.argv[2] if len(sys.argv) > 2 else "qwen3").save_pretrained(folder)
