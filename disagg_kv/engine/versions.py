"""Differences between vLLM 0.21 and 0.33, and everything that is read from vLLM's configuration and requests.

The same in all of them, and used elsewhere: the connector's constructor of three arguments, ``SchedulerOutput``'s new,
cached, preempted and finished requests, ``get_finished`` (from 0.30 on through ``get_transfer_results``),
``get_block_ids_with_load_errors``, ``kv_load_failure_policy``. ``start_load_kv`` runs before the forward pass up to
0.26 and after it from 0.32; ``wait_for_save`` is not called in steps without work up to 0.26. Nothing here depends on
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

from disagg_kv.model_config import every_layer_slides, unsupported

logger = logging.getLogger("vllm.disagg_kv")

OLDEST, NEWEST = (0, 21), (0, 33)


def check_version(text: str) -> None:
    """Check vLLM's version. Logs a warning above the newest one that was tested.

    Raises:
        ValueError: below the oldest supported version.
    """
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        logger.warning("unknown vLLM version %r; the connector was tested with 0.21 to 0.33", text)
        return
    version = (int(match[1]), int(match[2]))
    if OLDEST <= version <= NEWEST or version == (0, 1):
        return
    if version < OLDEST:
        raise ValueError(f"vLLM {text} is too old for this connector (0.21 or newer); use P2pNcclConnector there")
    logger.warning("this connector was tested with vLLM 0.21 to 0.33, not with %s", text)


def check_parallel(config: Any) -> None:
    """Check the kinds of parallelism, and that peers can read this engine's cache.

    Raises:
        ValueError: an unsupported setting; the text names it.
    """
    if getattr(getattr(config, "cache_config", None), "calculate_kv_scales", False):
        raise ValueError("calculate_kv_scales is not supported: each engine computes other scales for its FP8 cache")
    parallel = config.parallel_config
    for name in ("pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size",
                 "prefill_context_parallel_size"):  # fmt: skip
        size = getattr(parallel, name, 1)
        if size > 1:
            raise ValueError(f"this connector does not support {name} {size}; only tensor parallelism")


def check_model(config: Any) -> None:
    """Check what the model's configuration tells, before vLLM fails with other words (see ``model_config``).

    Raises:
        ValueError: this model cannot be served; the text is the reason.
    """
    try:
        fields = config.model_config.hf_config.to_dict()
    except Exception:  # no configuration of transformers (``params.json``): checked by its cache later
        return
    reason = unsupported(fields) and unsupported(fields, states=serves_states())
    if every_layer_slides(fields) and not serves_groups() and not config.model_config.disable_sliding_window:
        reason = "every layer has a sliding window, which needs vLLM 0.30 or newer (or --disable-sliding-window)"
    if reason:
        raise ValueError(f"{model_name(config)} cannot be served by prefill and decode engines: {reason}")


def layers_run_once(config: Any) -> bool:
    """Whether each layer runs once per step. With dual batch overlap it runs once per half of the batch."""
    parallel = config.parallel_config
    return not (getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False))


def tensor_parallel_size(config: Any) -> int:
    return int(config.parallel_config.tensor_parallel_size)


def tensor_parallel_rank() -> int:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def from_first_rank(value: int) -> int:
    """Return what tensor parallel rank 0 passed. Every rank must call it."""
    from vllm.distributed.parallel_state import get_tp_group

    return int(get_tp_group().broadcast_object(value, src=0))


def model_name(config: Any) -> str:
    """Return the last part of the model's name or path: engines may load the same model from different places."""
    return os.path.basename(str(config.model_config.model).rstrip("/"))


def local_folder(name: str, revision: str | None = None, cache: str | None = None) -> Path | None:
    """Return the local folder of a model or adapter, None if it is not on this machine.

    ``name`` is a path, or a Hub id whose snapshot vLLM has downloaded to ``cache`` (None: the default folder).
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except Exception:  # a bad id, another kind of store, nothing downloaded: many types
        return None


def model_files(config: Any) -> tuple[Path, Path | None, str]:
    """Return the folder (or GGUF file) of the configuration, that of the weights, and the load format.

    The weights are None for dummy weights, which vLLM draws with a fixed seed.

    Raises:
        ValueError: the files are not on this machine.
    """
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
    """Return settings that change the KV of the same tokens and weights, by name."""
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
    """Text without memory addresses for values that are not JSON: functions, enums, dataclasses."""
    named = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{named}" if named else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


_READ_ONLY = re.compile(r"(get|list|check|compute|save|profile|start_profile|stop_profile)(_|$)")
_HARMLESS = frozenset(
    {"initialize_cache", "update_max_model_len", "init_weight_transfer_engine", "shutdown_weight_transfer_engine",
     "synchronize_device", "checkpoint_prepare", "release_late_interaction_query_cache", "reset_mm_cache",
     "reset_encoder_cache"}
)  # fmt: skip


def watch_engine(writes: Callable[[str], None], loads: Callable[[Any], None]) -> None:
    """Install callbacks for changes of the weights of the engine in this process.

    vLLM has no hook for it, but every way leads through two methods of ``EngineCore`` (0.21 to 0.33,
    v1/engine/core.py): ``collective_rpc`` (``reload_weights``, ``update_weights``, ``start_weight_update``,
    ``apply_model``, methods of a worker extension) and ``add_lora``. A later call replaces the callbacks.

    Args:
        writes: called with a method's name before it runs on the workers, unless it is known not to change weights.
        loads: called with the ``LoRARequest`` of an adapter after it was loaded.
    """
    from vllm.v1.engine.core import EngineCore

    engine: Any = EngineCore
    rpc = getattr(engine.collective_rpc, "__wrapped__", engine.collective_rpc)
    add = getattr(engine.add_lora, "__wrapped__", engine.add_lora)

    @functools.wraps(rpc)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        name = method if isinstance(method, str) else f"function {getattr(method, '__name__', '')}"
        if name not in _HARMLESS and not _READ_ONLY.match(name):
            writes(name)
        return rpc(self, method, *args, **kwargs)

    @functools.wraps(add)
    def add_lora(self: Any, lora_request: Any, *args: Any, **kwargs: Any) -> Any:
        result = add(self, lora_request, *args, **kwargs)
        loads(lora_request)
        return result

    engine.collective_rpc, engine.add_lora = collective_rpc, add_lora


def host_ip() -> str:
    """Return VLLM_HOST_IP, or vLLM's guess of this machine's address."""
    from vllm.utils.network_utils import get_ip

    return str(get_ip())


def num_blocks(kv_cache_config: Any) -> int:
    return int(kv_cache_config.num_blocks)


def prompt_extras(request: Any) -> list[str]:
    """Return what determines a prompt's KV besides token ids, as texts."""
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
    """Return the prompt's token ids, None for a prompt of embeddings."""
    if getattr(request, "prompt_embeds", None) is not None:
        return None
    tokens: Sequence[int] | None = request.prompt_token_ids
    return tokens


def must_compute_prompt(request: Any) -> bool:
    """Whether the engine must compute every token of the prompt (prompt_logprobs).

    Loaded KV would leave their logprobs undefined. From 0.32 vLLM sets ``skip_reading_prefix_cache`` for that.
    """
    if getattr(request, "skip_reading_prefix_cache", False):
        return True
    sampling = getattr(request, "sampling_params", None)
    return getattr(sampling, "prompt_logprobs", None) is not None


def serves_groups() -> bool:
    """Whether this vLLM can recompute a failed load of a model with several cache groups.

    From 0.30 on a connector may name failed requests (``KVConnectorTransferResults``). Failed blocks, all that older
    ones know, end the engine there (0.32, v1/core/sched/scheduler.py, ``_handle_invalid_blocks``).
    """
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    return hasattr(base, "KVConnectorTransferResults")


def serves_states() -> bool:
    """Whether models with recurrent states are supported with this vLLM: from 0.32 on, the oldest one they ran with.

    vLLM zeroes new blocks of such models. From 0.32 on it asks the connector which groups a load fills, and does not
    zero those; older versions decide that otherwise.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    return hasattr(KVConnectorBase_V1, "get_loaded_kv_cache_group_ids")


def transfer_results(sent: set[str], received: set[str], failed: set[str]) -> Any:
    """Return vLLM's ``KVConnectorTransferResults``; those that failed are received too."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

    return KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)


def block_lists(block_ids: Any, groups: int) -> list[list[int]]:
    """Return the block ids of each cache group, from any form that vLLM uses."""
    return [list(ids) for ids in block_ids] if block_ids else [[] for _ in range(groups)]


def cut_last_token(request: Any) -> bool:
    """Take the last token off a prompt of prefill; False where that is not possible, and nothing has changed.

    Decode computes that token. It needs the tails of windows, and recurrent states, as they are before it, and vLLM
    frees what is behind a window when the request ends. A request that generates more than one token frees
    further blocks.
    """
    tokens = request.prompt_token_ids
    items = (item.mm_position for item in getattr(request, "mm_features", None) or ())
    in_item = any(position.offset + position.length >= len(tokens) for position in items)
    if len(tokens) < 2 or request.max_tokens != 1 or in_item or must_compute_prompt(request):
        return False
    request.prompt_token_ids = tokens[:-1]
    del request._all_token_ids[-1:]
    request.num_prompt_tokens -= 1
    return True


def aborted(request: Any) -> bool:
    return "FINISHED_ABORTED" in str(request.status) or "ERROR" in str(request.status)
