"""When there should be more engines of a role, and when fewer."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from disagg_ray import scaling
from disagg_ray.scaling import Figures
from disagg_ray.settings import Slo

SLO = Slo(ttft_ms=1000, itl_ms=50)

METRICS = """# TYPE disagg_proxy_time_to_first_token_seconds histogram
disagg_proxy_time_to_first_token_seconds_bucket{le="0.5"} 1.0
disagg_proxy_time_to_first_token_seconds_bucket{le="2.5"} 3.0
disagg_proxy_time_to_first_token_seconds_bucket{le="+Inf"} 3.0
disagg_proxy_time_to_first_token_seconds_count 3.0
disagg_proxy_time_to_first_token_seconds_sum 4.0
# TYPE disagg_proxy_requests_queued gauge
disagg_proxy_requests_queued 2.0
# TYPE disagg_proxy_instance_in_flight gauge
disagg_proxy_instance_in_flight{role="decode",instance="10.0.0.2:20000"} 30.0
disagg_proxy_instance_in_flight{role="decode",instance="10.0.0.3:20000"} 10.0
disagg_proxy_instance_in_flight{role="prefill",instance="10.0.0.4:20000"} 5.0
"""


def counts(*seconds: float) -> Counter[float]:
    """Cumulative buckets of these values."""
    return Counter({bound: sum(one <= bound for one in seconds) for bound in (0.01, 0.05, 0.5, 1.0, 2.0, math.inf)})


def test_several_proxies_are_added_up() -> None:
    figures = scaling.read_metrics([METRICS, METRICS, ""])
    assert (figures.queued, figures.in_flight) == (4, 80)
    assert figures.ttft == {0.5: 2, 2.5: 6, math.inf: 6} and not figures.gap


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        (counts(0.4), {}, 0.5),
        (counts(*[0.4] * 9, 1.5), {}, 0.5),
        (counts(*[0.4] * 8, 1.5, 1.5), {}, 2.0),
        (counts(3.0), {}, 4.0),
        (counts(), {}, 0.0),
        (counts(1.5, 0.4), counts(1.5), 0.5),
        (counts(1.5), counts(1.5), 0.0),
        (counts(0.4), counts(1.5, 1.5), 0.5),
    ],
    ids=["one", "nine_of_ten", "tail", "beyond", "none", "since_then", "nothing_new", "proxy_restarted"],
)
def test_the_quantile_is_of_what_was_counted_since(
    now: Counter[float], before: Counter[float], expected: float
) -> None:
    assert scaling.quantile(now, before) == expected


def test_prefill_is_judged_by_the_time_to_first_token() -> None:
    slow = Figures(ttft=counts(1.5))
    assert scaling.prefill_pressure(slow, Figures(), SLO) == 2.0
    assert scaling.prefill_pressure(Figures(ttft=counts(0.4)), Figures(), SLO) == 0.5
    slow.queued = 3
    assert scaling.prefill_pressure(slow, Figures(), SLO) == 1.0, "more prefills would not help"


def test_decode_is_judged_by_its_slots_and_its_latency() -> None:
    busy = Figures(in_flight=60, queued=4, gap=counts(0.04))
    assert scaling.decode_load(busy, 32) == 2
    assert scaling.decode_latency(busy, Figures(), SLO) == 1.0
    assert scaling.decode_pressure(load=2, latency=1.0, count=2) == 1 / scaling.BUSY_SHARE
    assert scaling.decode_pressure(load=0.1, latency=3.0, count=2) == 3.0


@pytest.mark.parametrize(
    ("count", "pressure", "expected"),
    [
        (1, 0.0, 1), (1, 1.0, 1), (1, 1.1, 2), (2, 1.1, 3), (4, 1.5, 6), (4, 9.0, 8),
        (2, 0.5, 2), (2, 0.3, 1), (10, 0.65, 10), (10, 0.6, 9), (0, 0.0, 1),
    ],
)  # fmt: skip
def test_the_wanted_number(count: int, pressure: float, expected: int) -> None:
    assert scaling.wanted(count, pressure) == expected


@pytest.mark.parametrize("count", range(2, 50))
def test_an_engine_that_leaves_is_not_wanted_back(count: int) -> None:
    for hundredths in range(100):
        pressure = hundredths / 100
        if scaling.wanted(count, pressure) < count:
            assert scaling.wanted(count - 1, pressure * count / (count - 1)) <= count - 1
