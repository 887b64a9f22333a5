"""What config.json tells of models that the connector cannot serve; excerpts of published configurations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from disagg_kv.engine import versions
from disagg_kv.model_config import every_layer_slides, unsupported

RECURRENT = "recurrent state"


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_type": "qwen3"}, ""),
        ({"model_type": "llama", "is_encoder_decoder": False, "sliding_window": None}, ""),
        ({"model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"] * 12}, ""),
        ({"model_type": "gemma3", "text_config": {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}}, ""),
        ({"model_type": "llama4_text", "layer_types": ["chunked_attention"] * 3 + ["full_attention"]}, ""),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, ""),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention"] * 4, "mamba_d_state": 256}, ""),
        ({"model_type": "some_new_model", "layer_types": ["compressed_attention"]}, ""),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}, RECURRENT),
        ({"model_type": "qwen3_next"}, RECURRENT),
        ({"model_type": "qwen3_5", "text_config": {"layer_types": ["linear_attention", "full_attention"]}}, RECURRENT),
        ({"model_type": "falcon_h1", "mamba_d_ssm": 1024}, RECURRENT),
        ({"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention"]}, RECURRENT),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, RECURRENT),
        ({"model_type": "kimi_linear", "kv_lora_rank": 512}, RECURRENT),
        ({"model_type": "deepseek_v32", "kv_lora_rank": 512, "index_topk": 2048}, "indexer"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"layer_types": [], "text_config": None}, ""),
        ({"layer_types": "mamba"}, ""),
    ],
)
def test_unsupported_models(config: dict[str, Any], word: str) -> None:
    reason = unsupported(config)
    assert (word in reason) if word else reason == ""


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}, ""),
        ({"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention"]}, ""),
        ({"model_type": "falcon_h1", "mamba_d_ssm": 1024}, ""),
        ({"model_type": "qwen3_next"}, "type qwen3_next"),
        ({"text_config": {"model_type": "qwen3_5_text", "layer_types": ["linear_attention"]}}, "type qwen3_5_text"),
        ({"model_type": "granitemoehybrid", "layer_types": ["linear_attention", "full_attention"]}, ""),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "kind conv"),
        ({"model_type": "lfm2"}, "type lfm2"),
        ({"model_type": "minimax_text_01", "layer_types": ["linear_attention", "full_attention"]}, "minimax_text_01"),
        ({"model_type": "jamba", "layers_block_type": ["mamba", "attention"]}, "type jamba"),
        ({"model_type": "mamba2"}, "type mamba2"),
        ({"model_type": "deepseek_v32", "index_topk": 2048}, "indexer"),
    ],
)
def test_states_that_can_be_moved_need_a_newer_vllm(config: dict[str, Any], word: str) -> None:
    assert unsupported(config)
    reason = unsupported(config, states=True)
    assert (word in reason) if word else reason == ""


@pytest.mark.parametrize(
    ("config", "slides"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, True),
        ({"model_type": "mistral", "sliding_window": None}, False),
        ({"model_type": "mistral"}, False),
        (
            {"model_type": "ministral", "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            False,
        ),
        ({"model_type": "x", "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, True),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, False),
    ],
)
def test_models_of_which_every_layer_slides(config: dict[str, Any], slides: bool) -> None:
    assert every_layer_slides(config) is slides


def test_the_engine_says_so_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "serves_states", lambda: False)

    def engine(**fields: Any) -> Any:
        return SimpleNamespace(
            model_config=SimpleNamespace(model="/models/granite", hf_config=SimpleNamespace(to_dict=lambda: fields))
        )

    versions.check_model(engine(model_type="llama"))
    versions.check_model(SimpleNamespace(model_config=SimpleNamespace()))
    with pytest.raises(
        ValueError, match="granite cannot be served by prefill and decode engines: layers of kind mamba"
    ):
        versions.check_model(engine(layer_types=["mamba", "attention"]))
    monkeypatch.setattr(versions, "serves_states", lambda: True)
    versions.check_model(engine(layer_types=["mamba", "attention"]))


@pytest.mark.parametrize(("several", "disabled"), [(True, False), (False, True), (False, False)])
def test_a_window_in_every_layer_needs_a_newer_vllm(
    several: bool, disabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "serves_groups", lambda: several)
    fields = {"model_type": "mistral", "sliding_window": 4096}
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model="m", hf_config=SimpleNamespace(to_dict=lambda: fields), disable_sliding_window=disabled
        )
    )
    if several or disabled:
        versions.check_model(config)
    else:
        with pytest.raises(ValueError, match="every layer has a sliding window"):
            versions.check_model(config)
