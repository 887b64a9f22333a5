"""Progress of an engine as its own /metrics show it: the counters that only the engine core changes.

The API server answers /metrics while the forward pass is stalled, with the numbers of the last completed step
(vLLM 0.9.2 - 0.23, ``v1/metrics/loggers.py``). Gauges of running and waiting requests are not used: a new request
could change them. With --disable-log-stats there are no counters.
"""

from __future__ import annotations

_PROGRESS = (
    b"vllm:generation_tokens_total",
    b"vllm:prompt_tokens_total",
    b"vllm:iteration_tokens_total_count",
    b"vllm:kv_cache_usage_perc",
    b"vllm:gpu_cache_usage_perc",
)


def engine_counters(metrics: bytes) -> tuple[bytes, ...]:
    """The lines of /metrics that change with an engine step; empty when the text has none."""
    return tuple(line for line in metrics.splitlines() if line.startswith(_PROGRESS))
