"""Counts and latency percentiles."""

from disagg_proxy.telemetry.stats import Latency, Stats


def test_no_values_no_percentiles() -> None:
    assert Latency().summary() == {"count": 0, "p50_s": None, "p90_s": None, "p99_s": None, "max_s": None}


def test_one_value_is_every_percentile() -> None:
    latency = Latency()
    latency.add(0.25)
    assert latency.summary() == {"count": 1, "p50_s": 0.25, "p90_s": 0.25, "p99_s": 0.25, "max_s": 0.25}


def test_percentiles_do_not_depend_on_the_order_of_arrival() -> None:
    rising, falling = Latency(), Latency()
    for value in range(101):
        rising.add(value)
        falling.add(100 - value)
    assert rising.summary() == {"count": 101, "p50_s": 50, "p90_s": 90, "p99_s": 99, "max_s": 100}
    assert falling.summary() == rising.summary()


def test_only_recent_values_count_for_percentiles_but_all_are_counted() -> None:
    latency = Latency()
    latency.add(1000.0)
    for _ in range(2048):
        latency.add(1.0)
    assert latency.summary() == {"count": 2049, "p50_s": 1.0, "p90_s": 1.0, "p99_s": 1.0, "max_s": 1.0}


def test_the_start_is_the_clocks_reading_at_creation() -> None:
    assert Stats(lambda: 12.5).started_at == 12.5
