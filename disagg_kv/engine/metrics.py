"""Counters of transfers in vLLM's /metrics and in its periodic log line.

The interface is vllm/distributed/kv_transfer/kv_connector/v1/metrics.py, the same from 0.27 to 0.32 in what is used;
each worker's counts of a step travel with its output to the process that serves /metrics.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from disagg_kv.outcomes import HELP, LABELS, LOADED, RECOMPUTED, UNFETCHED, add


class Stats(KVConnectorStats):
    """Counts of an interval; ``data`` is that of ``Outcomes.take``."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        add(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return {
            "prompts loaded": self.data.get(LOADED, 0),
            "recomputed": sum(self.data.get(RECOMPUTED, {}).values()),
            "not fetched": sum(self.data.get(UNFETCHED, {}).values()),
        }

    def is_empty(self) -> bool:
        return not self.data


class PrometheusMetrics(KVConnectorPromMetrics):
    """The counters of ``outcomes.HELP``; every reason starts at 0."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(
                name=f"vllm:{name}",
                documentation=text,
                labelnames=[*labelnames, *(["reason"] if name in LABELS else [])],
            )
            for name, text in HELP.items()
        }
        for engine in per_engine_labelvalues:
            self._counter(engine, LOADED)
            for name, reasons in LABELS.items():
                for reason in reasons:
                    self._counter(engine, name, reason)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if name == LOADED:
                self._counter(engine_idx, name).inc(value)
            elif name in LABELS:
                for reason, count in value.items():
                    self._counter(engine_idx, name, reason).inc(count)

    def _counter(self, engine: int, name: str, *reason: str) -> Any:
        return self._counters[name].labels(*self.per_engine_labelvalues[engine], *reason)
