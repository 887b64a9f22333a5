"""KV bytes of a token from a model's configuration."""

import json
from pathlib import Path

import pytest

from disagg_machine.kv_bytes import kv_bytes_per_token

QWEN3_4B = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
LATENT = {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        (QWEN3_4B, "auto", 147456),
        (QWEN3_4B, "float32", 294912),
        ({"text_config": QWEN3_4B}, "bfloat16", 147456),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}, "auto", 2 * 2 * 4 * 8 * 2),
        (LATENT, "auto", 61 * 576 * 2),
        ({}, "auto", 0),
        ([], "auto", 0),
    ],
)
def test_from_a_directory(tmp_path: Path, config: object, dtype: str, expected: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert kv_bytes_per_token(str(tmp_path), dtype) == expected


def test_from_the_cache_of_downloads(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-4B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(QWEN3_4B))
    for environ in ({"HF_HOME": str(tmp_path)}, {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": "/nowhere"}):
        assert kv_bytes_per_token("Qwen/Qwen3-4B", environ=environ) == 147456
        assert kv_bytes_per_token("Qwen/Other", environ=environ) == 0
