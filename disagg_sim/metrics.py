"""An engine's counters, and /metrics in Prometheus' text form, names as in vLLM 0.21 ``v1/metrics/loggers.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from disagg_kv.outcomes import HELP, LABELS


@dataclass
class Counters:
    """Totals since the start."""

    prompt_tokens: int = 0
    local_compute: int = 0
    local_cache_hit: int = 0
    external_kv_transfer: int = 0
    generation_tokens: int = 0
    aborted: int = 0
    preemptions: int = 0
    success: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0})

    def prompt(self, *, total: int, local: int = 0, external: int = 0) -> None:
        """Count one prompt: ``local`` tokens from the prefix cache, ``external`` from another engine."""
        self.prompt_tokens += total
        self.local_cache_hit += local
        self.external_kv_transfer += external
        self.local_compute += total - local - external

    def finished(self, reason: str) -> None:
        """Count one sequence that ended with its last token, by ``finish_reason``."""
        self.success[reason] += 1


@dataclass(frozen=True, slots=True)
class KvCache:
    """An engine's KV cache, in blocks.

    Attributes:
        used: of running and loading requests, and of finished ones whose KV decode has not fetched. May exceed
            ``blocks`` where the simulated scheduler does not enforce the size.
        tells_tokens: whether ``cache_config_info`` has the label ``kv_cache_size_tokens`` (seen in vLLM 0.27.1 and
            0.32, ``config/cache.py``).
    """

    block_size: int
    blocks: int
    used: int
    tells_tokens: bool

    @property
    def usage(self) -> float:
        """Share in use, from 0 to 1."""
        return min(1.0, self.used / self.blocks)

    def labels(self, prefix_caching: bool) -> str:
        """Labels of ``vllm:cache_config_info`` besides ``engine``; all fields of vLLM's CacheConfig are text there."""
        found = {"block_size": self.block_size, "cache_dtype": "auto", "enable_prefix_caching": prefix_caching}
        found |= {"kv_cache_size_tokens": self.blocks * self.block_size} if self.tells_tokens else {}
        found["num_gpu_blocks"] = self.blocks
        return ",".join(f'{name}="{value}"' for name, value in found.items())


def exposition(
    counters: Counters,
    *,
    model: str,
    running: int,
    waiting: int,
    steps: int,
    kv_cache: KvCache | None = None,
    prefix_caching: bool = True,
    transfers: Mapping[str, Any] | None = None,
) -> str:
    """The complete /metrics text. ``running`` and ``waiting`` are those of the end of the last step, as in vLLM.

    ``kv_cache``: None leaves its gauges out. ``transfers``: totals of ``disagg_kv/outcomes.py``; None for other
    connectors.
    """
    labels = f'engine="0",model_name="{_escape(model)}"'
    lines: list[str] = []

    def family(name: str, kind: str, help_text: str, samples: dict[str, float]) -> None:
        full = f"{name}_total" if kind == "counter" else name
        lines.append(f"# HELP {full} {help_text}")
        lines.append(f"# TYPE {full} {kind}")
        lines.extend(f"{full}{{{labels}{extra}}} {float(value)!r}" for extra, value in samples.items())

    family("vllm:num_requests_running", "gauge", "Requests in the batch.", {"": running})
    family("vllm:num_requests_waiting", "gauge", "Requests waiting to be processed.", {"": waiting})
    if kv_cache is not None:
        family("vllm:kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", {"": kv_cache.usage})
        # Labels of its own, without the model's name (vLLM 0.32 ``v1/metrics/loggers.py``, ``log_metrics_info``).
        lines.append("# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig")
        lines.append("# TYPE vllm:cache_config_info gauge")
        lines.append(f'vllm:cache_config_info{{{kv_cache.labels(prefix_caching)},engine="0"}} 1.0')
    family("vllm:prompt_tokens", "counter", "Prefill tokens processed.", {"": counters.prompt_tokens})
    family(
        "vllm:prompt_tokens_by_source",
        "counter",
        "Number of prompt tokens by source.",
        {
            ',source="local_compute"': counters.local_compute,
            ',source="local_cache_hit"': counters.local_cache_hit,
            ',source="external_kv_transfer"': counters.external_kv_transfer,
        },
    )
    family("vllm:generation_tokens", "counter", "Generation tokens processed.", {"": counters.generation_tokens})
    tokens = counters.prompt_tokens + counters.generation_tokens
    lines.append("# HELP vllm:iteration_tokens_total Histogram of number of tokens per engine_step.")
    lines.append("# TYPE vllm:iteration_tokens_total histogram")
    for name, value in (("_bucket", steps), ("_sum", tokens), ("_count", steps)):
        bound = ',le="+Inf"' if name == "_bucket" else ""
        lines.append(f"vllm:iteration_tokens_total{name}{{{labels}{bound}}} {value:.1f}")
    family("vllm:prefix_cache_hits", "counter", "Prefix cache hits, in tokens.", {"": counters.local_cache_hit})
    family("vllm:prefix_cache_queries", "counter", "Prefix cache queries, in tokens.", {"": counters.prompt_tokens})
    family("vllm:num_preemptions", "counter", "Cumulative number of preemptions.", {"": counters.preemptions})
    family(
        "vllm:request_success",
        "counter",
        "Successfully processed requests.",
        {
            **{f',finished_reason="{reason}"': count for reason, count in counters.success.items()},
            ',finished_reason="abort"': counters.aborted,
        },
    )
    for name, text in HELP.items() if transfers is not None else ():
        found = (transfers or {}).get(name, 0)
        by_reason = {f',reason="{reason}"': found.get(reason, 0) if found else 0 for reason in LABELS.get(name, ())}
        family(f"vllm:{name}", "counter", text, by_reason or {"": found})
    return "\n".join(lines) + "\n"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
