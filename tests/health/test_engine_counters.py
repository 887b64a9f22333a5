"""Which lines of an engine's /metrics prove progress."""

from disagg_proxy.health.engine_counters import engine_counters

METRICS = b"""# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} %d.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 9.0
vllm:num_requests_waiting{engine="0",model_name="m"} %d.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 1.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 5.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
http_requests_total{handler="/metrics"} %d.0
process_cpu_seconds_total %d.0
"""


def test_only_what_the_engine_core_changes_counts() -> None:
    before = engine_counters(METRICS % (7, 0, 1, 1))
    assert len(before) == 4
    assert engine_counters(METRICS % (7, 3, 2, 2)) == before, "newcomers, scrapes and CPU time are no steps"
    assert engine_counters(METRICS % (8, 0, 1, 1)) != before


def test_an_engine_without_statistics_has_none() -> None:
    assert engine_counters(b"process_cpu_seconds_total 1.0\n") == ()
