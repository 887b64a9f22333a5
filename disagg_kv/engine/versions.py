"""Differences between vLLM's versions, 0.21 to 0.33, and everything that is read from its configuration.

What does not differ (and is used elsewhere): the connector's constructor of three arguments, ``SchedulerOutput``'s
new, cached, preempted and finished requests, ``get_finished`` and ``get_block_ids_with_load_errors`` (0.32 wraps them
in ``get_transfer_results``), ``kv_load_failure_policy``. ``start_load_kv`` runs before the forward pass up to 0.26
and after it from 0.32; ``wait_for_save`` is not called in steps without work up to 0.26. Nothing here depends on
either: loads are asynchronous, and only steps with work have something to send.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger("vllm.disagg_kv")

OLDEST, NEWEST = (0, 21), (0, 33)


def check_version(text: str) -> None:
    """ValueError below the oldest version; a warning above the newest one that was tried."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        logger.warning("this vLLM calls itself %r; the connector was tried with 0.21 to 0.33", text)
        return
    version = (int(match[1]), int(match[2]))
    if OLDEST <= version <= NEWEST or version == (0, 1):
        return
    if version < OLDEST:
        raise ValueError(f"vLLM {text} is too old for this connector (0.21 or newer); use P2pNcclConnector there")
    logger.warning("this connector was tried with vLLM 0.21 to 0.33, not with %s", text)


def check_parallel(config: Any) -> None:
    """ValueError for what would need more than one rank of one group per peer, and for a cache that only its own engine
    can read."""
    if getattr(getattr(config, "cache_config", None), "calculate_kv_scales", False):
        raise ValueError("calculate_kv_scales is not supported: each engine computes other scales for its FP8 cache")
    parallel = config.parallel_config
    for name in ("pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size",
                 "prefill_context_parallel_size"):  # fmt: skip
        size = getattr(parallel, name, 1)
        if size > 1:
            raise ValueError(f"this connector does not support {name} {size}; only tensor parallelism")


def layers_run_once(config: Any) -> bool:
    """Whether each layer runs once in a step; with dual batch overlap it runs for each half of the batch."""
    parallel = config.parallel_config
    return not (getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False))


def tensor_parallel_size(config: Any) -> int:
    return int(config.parallel_config.tensor_parallel_size)


def tensor_parallel_rank() -> int:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def model_name(config: Any) -> str:
    """Last part of the model's name or path: engines may find the same model in different places."""
    return os.path.basename(str(config.model_config.model).rstrip("/"))


def local_folder(name: str, revision: str | None = None, cache: str | None = None) -> Path | None:
    """Where a model or adapter lies on this machine: its path, or the snapshot of a Hub id that vLLM has downloaded to
    the folder ``cache`` (None: the default). None if it does not."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except Exception:  # a bad id, another kind of store, nothing downloaded: many types
        return None


def model_files(config: Any) -> tuple[Path, Path | None, str]:
    """Folder (or GGUF file) of the configuration, of the weights (None for dummy weights, which vLLM draws with a fixed
    seed), and the load format. ValueError if they are not on this machine."""
    model, load = config.model_config, config.load_config
    load_format = str(getattr(load.load_format, "value", load.load_format)).lower()
    cache = load.download_dir
    weights = local_folder(getattr(model, "model_weights", "") or model.model, model.revision, cache)
    overridden = getattr(model, "hf_config_path", None)
    description = local_folder(overridden or model.model, model.revision, cache)
    if description is None or (weights is None and load_format != "dummy"):
        raise ValueError(f"{model.model} is not on this machine")
    return description, None if load_format == "dummy" else weights, load_format


def model_facts(config: Any) -> dict[str, str]:
    """What else in the configuration changes the KV of the same tokens and weights, by name."""
    model, cache = config.model_config, str(config.cache_config.cache_dtype)
    facts = {
        name: json.dumps(value, sort_keys=True, default=_stable)
        for name in ("quantization", "quantization_config", "hf_overrides", "rope_scaling", "rope_theta",
                     "override_attention_dtype", "disable_sliding_window", "model_class_overrides")
        if (value := getattr(model, name, None))
    }  # fmt: skip
    facts["dtype"] = str(model.dtype)
    if cache not in ("auto", "float16", "bfloat16", "float32", "half", "float"):
        # Quantised caches of different formats are all tensors of bytes. "fp8" is an alias of "fp8_e4m3".
        facts["cache_dtype"] = "fp8_e4m3" if cache == "fp8" else cache
    text = getattr(model, "hf_text_config", None)
    if any("longrope" in str(getattr(text, name, "")) for name in ("rope_parameters", "rope_scaling")):
        # The factors depend on it (0.32, layers/rotary_embedding/phi3_long_rope_scaled_rope.py).
        facts["max_model_len"] = str(model.max_model_len)
    if getattr(model, "is_multimodal_model", False):
        # Part of the hash of an image, so other spellings never match (0.32, multimodal/processing/inputs.py).
        facts["model"] = str(model.model)
    return facts


def _stable(value: Any) -> str:
    """A text without addresses in memory for what is not JSON: functions, enums, dataclasses."""
    named = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{named}" if named else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


_READS = re.compile(r"(get|list|check|compute|save|profile|start_profile|stop_profile)(_|$)")
_HARMLESS = frozenset(
    {"initialize_cache", "update_max_model_len", "init_weight_transfer_engine", "shutdown_weight_transfer_engine",
     "synchronize_device", "checkpoint_prepare", "release_late_interaction_query_cache", "reset_mm_cache",
     "reset_encoder_cache"}
)  # fmt: skip


def watch_engine(writes: Callable[[str], None], loads: Callable[[Any], None]) -> None:
    """Follows what changes the weights of the running engine of this process.

    vLLM has no hook for it, but all ways lead through two methods of ``EngineCore`` (0.21 to 0.33, v1/engine/core.py):
    ``collective_rpc`` (``reload_weights``, ``update_weights``, ``start_weight_update``, ``apply_model``, methods of a
    worker extension) and ``add_lora``. Only the newest caller of this function is notified.

    Args:
        writes: called with a method's name before it runs on the workers, unless it is known to leave weights alone.
        loads: called with the ``LoRARequest`` of an adapter once it is loaded.
    """
    from vllm.v1.engine.core import EngineCore

    engine: Any = EngineCore
    rpc = getattr(engine.collective_rpc, "__wrapped__", engine.collective_rpc)
    add = getattr(engine.add_lora, "__wrapped__", engine.add_lora)

    @functools.wraps(rpc)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        name = method if isinstance(method, str) else f"function {getattr(method, '__name__', '')}"
        if name not in _HARMLESS and not _READS.match(name):
            writes(name)
        return rpc(self, method, *args, **kwargs)

    @functools.wraps(add)
    def add_lora(self: Any, lora_request: Any, *args: Any, **kwargs: Any) -> Any:
        result = add(self, lora_request, *args, **kwargs)
        loads(lora_request)
        return result

    engine.collective_rpc, engine.add_lora = collective_rpc, add_lora


def host_ip() -> str:
    """VLLM_HOST_IP, or what vLLM takes for this machine's address."""
    from vllm.utils.network_utils import get_ip

    return str(get_ip())


def num_blocks(kv_cache_config: Any) -> int:
    return int(kv_cache_config.num_blocks)


def prompt_extras(request: Any) -> list[str]:
    """What besides token ids determines a prompt's KV."""
    extras = []
    lora = getattr(request, "lora_request", None)
    if lora is not None:
        extras.append(f"lora:{lora.lora_name}")
    salt = getattr(request, "cache_salt", None)
    if salt:
        extras.append(f"salt:{salt}")
    for item in getattr(request, "mm_features", None) or ():
        position = item.mm_position
        extras.append(f"mm:{item.identifier}:{position.offset}:{position.length}")
    return extras


def prompt_tokens(request: Any) -> Sequence[int] | None:
    """Token ids of the prompt, None where it is given as embeddings."""
    if getattr(request, "prompt_embeds", None) is not None:
        return None
    tokens: Sequence[int] | None = request.prompt_token_ids
    return tokens


def needs_whole_prompt(request: Any) -> bool:
    """Whether the engine has to compute every token of the prompt itself (prompt_logprobs): loaded KV would leave their
    logprobs undefined. From 0.32 vLLM asks for that itself."""
    if getattr(request, "skip_reading_prefix_cache", False):
        return True
    sampling = getattr(request, "sampling_params", None)
    return getattr(sampling, "prompt_logprobs", None) is not None


def first_group(block_ids: Any) -> list[int]:
    """Block ids of the only cache group, from any of vLLM's forms."""
    return list(block_ids[0]) if block_ids else []


def aborted(request: Any) -> bool:
    return "FINISHED_ABORTED" in str(request.status) or "ERROR" in str(request.status)
