"""The load of an engine as its own /metrics show it, read about once a second."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One reading; None where the engine does not show the figure (vLLM ``v1/metrics/loggers.py``).

    Attributes:
        at: clock reading of :meth:`Registry.now` when it was read, in seconds.
        running: requests in the batch (``vllm:num_requests_running``).
        waiting: requests that wait for a step or for KV (``vllm:num_requests_waiting``).
        kv_usage: share of the KV cache in use, 0 to 1 (``vllm:kv_cache_usage_perc``).
        kv_capacity_tokens: tokens that the KV cache holds, by the labels of ``vllm:cache_config_info``:
            ``kv_cache_size_tokens`` where present, else the number of blocks times the block size.
        kv_dropped: prompts so far whose KV prefill gave up before decode loaded it, since too much of it waited or it
            waited for too long: on decode those that it computed again, on prefill those that were not fetched.
    """

    at: float
    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    kv_capacity_tokens: int | None = None
    kv_dropped: int | None = None
