"""Differences between vLLM's versions, 0.21 to 0.33, and everything that is read from its configuration.

What does not differ (and is used elsewhere): the connector's constructor of three arguments, ``SchedulerOutput``'s
new, cached, preempted and finished requests, ``get_finished`` and ``get_block_ids_with_load_errors`` (0.32 wraps them
in ``get_transfer_results``), ``kv_load_failure_policy``. ``start_load_kv`` runs before the forward pass up to 0.26
and after it from 0.32; ``wait_for_save`` is not called in steps without work up to 0.26. Nothing here depends on
either: loads are asynchronous, and only steps with work have something to send.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
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
    """ValueError for what would need more than one rank of one group per peer."""
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
