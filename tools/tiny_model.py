"""Write a tiny Qwen3 with random weights and a tokenizer: ``python tools/tiny_model.py FOLDER``.

Runs in an environment with vLLM, whose torch, transformers and tokenizers it needs. The weights come from a fixed
seed, and the tokenizer knows bytes only and a few words, so the same versions write the same model.
"""

from __future__ import annotations

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 1024
END, PAD = "<|im_end|>", "<|endoftext|>"
TEXT = __doc__ or ""
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% if add_generation_prompt %}assistant: {% endif %}"
)


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


def qwen3() -> Qwen3ForCausalLM:
    """Four layers; the last norm is scaled up, so that the logits differ enough for one clear choice a step."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
        initializer_range=0.05, bos_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    made = Qwen3ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        made.model.norm.weight.mul_(4)
    return made


if __name__ == "__main__":
    folder = sys.argv[1]
    tokenizer().save_pretrained(folder)
    qwen3().save_pretrained(folder)
