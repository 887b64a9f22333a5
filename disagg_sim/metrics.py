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


def exposition(
    counters: Counters,
    *,
    model: str,
    running: int,
    waiting: int,
    steps: int,
    transfers: Mapping[str, Any] | None = None,
) -> str:
    """The complete /metrics text. ``running`` and ``waiting`` are those of the end of the last step, as in vLLM.

    ``transfers``: totals of ``disagg_kv/outcomes.py``; None for other connectors.
    """
    labels = f'engine="0",model_name="{_escape(model)}"'
    lines: list[str] = []

    def family(name: str, kind: str, help_text: str, samples: dict[str, float]) -> None:
        full = f"{name}_total" if kind == "counter" else name
        lines.append(f"# HELP {full} {help_text}")
        lines.append(f"# TYPE {full} {kind}")
        lines.extend(f"{full}{{{labels}{extra}}} {value:.1f}" for extra, value in samples.items())

    family("vllm:num_requests_running", "gauge", "Requests in the batch.", {"": running})
    family("vllm:num_requests_waiting", "gauge", "Requests waiting to be processed.", {"": waiting})
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
