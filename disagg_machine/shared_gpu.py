"""A prefill and a decode engine on one GPU: when that is allowed, and how they divide its memory. Pure.

They exchange KV by CUDA IPC (docs/connector.md). It is for trying, tests and development: both engines use the same
SMs, so decode is not isolated from prefill, which is the purpose of P/D disaggregation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from disagg_machine import gpus
from disagg_machine.gpus import Gpu
from disagg_machine.layout import Layout
from disagg_machine.settings import DEFAULT, Settings
from disagg_machine.values import Number

UTILIZATION = Number("0.2")
"""vLLM refuses to start where less than this share of the GPU is free (0.33, "Free memory ... is less than desired GPU
memory utilization"); the size of the cache comes from --kv-cache-memory-bytes."""
_KV_SHARE = 10
"""The KV cache of each engine is the GPU's memory divided by this."""
_UNKNOWN_MIB = 4096
_MIB = 1 << 20


def may_share(settings: Settings, found: Sequence[Gpu]) -> bool:
    """Whether a prefill and a decode engine may use one GPU."""
    if settings.allow_shared_gpu == "auto":
        return len(found) == 1
    return settings.allow_shared_gpu == "1"


def on_one_gpu(settings: Settings, found: Sequence[Gpu]) -> Settings:
    """The settings for these GPUs: on a single one decode gets the GPU of prefill, unless the user names one."""
    chosen = settings.decode_gpus or settings.prefill_gpus or settings.sources["DECODE_GPU"] != DEFAULT
    if len(found) != 1 or chosen or settings.tensor_parallel > 1 or not may_share(settings, found):
        return settings
    return _with_texts(settings, DECODE_GPU=settings.prefill_gpu)


def with_small_shares(settings: Settings) -> Settings:
    """The settings for engines that share a GPU: shares of its memory with which both start."""
    given = {name for name in ("GPU_MEMORY_UTILIZATION", "PREFILL_GPU_MEMORY_UTILIZATION",
                               "DECODE_GPU_MEMORY_UTILIZATION") if settings.sources[name] != DEFAULT}  # fmt: skip
    roles = [role for role in ("PREFILL", "DECODE")
             if not given & {"GPU_MEMORY_UTILIZATION", f"{role}_GPU_MEMORY_UTILIZATION"}]  # fmt: skip
    return _with_texts(settings, **{f"{role}_GPU_MEMORY_UTILIZATION": UTILIZATION for role in roles})


def kv_cache_bytes(settings: Settings, layout: Layout, found: Sequence[Gpu], bytes_per_token: int) -> int:
    """Bytes of KV cache of each engine where GPUs are shared: a tenth of the smallest of them, and at least two prompts
    of the maximum length."""
    total = [gpu.total_mib for word in layout.shared_gpus if (gpu := gpus.find(list(found), word)) is not None]
    tenth = (min(filter(None, total), default=_UNKNOWN_MIB * _KV_SHARE) // _KV_SHARE) * _MIB
    return max(tenth, 2 * settings.max_model_len * bytes_per_token)


def _with_texts(settings: Settings, **texts: str) -> Settings:
    """These values, also as texts; they count as defaults still."""
    if not texts:
        return settings
    fields = {name.lower(): value for name, value in texts.items()}
    return replace(settings, texts={**settings.texts, **texts}, **fields)  # type: ignore[arg-type]
