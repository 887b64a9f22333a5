"""The measurement of a tier of proxies in a few seconds: that it measures, and what it makes of its figures."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from bench import proxy_tier


async def test_load_is_divided_among_the_proxies() -> None:
    found = await proxy_tier.throughput(2, 4, 60, 4)
    assert (found["proxies"], found["engines"], found["requests"], found["failed"]) == (2, 4, 60, 0)
    assert found["requests_per_second"] > 0 and found["cpu_us_per_request"] >= 0


async def test_idle_proxies_are_measured_without_a_namespace() -> None:
    found = await proxy_tier.idle(1, 2, 0.2)
    assert found["cpu_ms_per_second"] > 0 and "bytes_per_second" not in found
    assert proxy_tier.traffic() is None


def test_traffic_is_that_of_the_loopback_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_PROXY_TIER_NAMESPACE", "1")
    before = proxy_tier.traffic()
    assert before is not None and all(number >= 0 for number in before)


def test_a_choice_among_more_engines_costs_more_after_a_change() -> None:
    few, many = proxy_tier.choice(2), proxy_tier.choice(64)
    assert few["choose_us"] > 0 and few["after_a_change_us"] < many["after_a_change_us"]


def row(proxies: int, engines: int, cpu: float, sent: float | None = None) -> dict[str, Any]:
    traffic = {} if sent is None else {"bytes_per_second": sent, "packets_per_second": sent / 100}
    return {"proxies": proxies, "engines": engines, "cpu_ms_per_second": cpu, **traffic}


def test_one_engine_is_the_difference_between_many_and_few() -> None:
    rows = [row(1, 2, 1.0, 100), row(1, 16, 8.0, 1500), row(4, 2, 1.0, 100), row(4, 16, 15.0, 2900)]
    found = proxy_tier.each_engine(rows)
    assert found == {"cpu_ms_per_second": 0.75, "bytes_per_second": 150, "packets_per_second": 1.5}
    assert proxy_tier.each_engine([row(1, 2, 1.0), row(1, 4, 2.0)]) == {"cpu_ms_per_second": 0.5}
    assert proxy_tier.each_engine([row(1, 2, 1.0)]) == {}


def test_the_table_says_what_was_not_measured() -> None:
    one = {"proxies": 1, "engines": 2, "requests_per_second": 10.0, "cpu_us_per_request": 900.0, "pinned": False}
    found = {
        "throughput": [one, {**one, "requests_per_second": 30.0}, {**one, "requests_per_second": 20.0}],
        "idle": [row(1, 2, 1.0), row(1, 16, 8.0, 1500)],
        "each_engine": {"cpu_ms_per_second": 0.5},
        "choice": [{"engines": 2, "choose_us": 1.5, "after_a_change_us": 20.0}],
    }
    text = proxy_tier.table(found)
    assert "1        2        20          900" in text and "not pinned" in text
    assert "not measured" in text and "1500" in text and "one more engine: 0.500 cpu_ms_per_second" in text


@pytest.mark.parametrize("counts", [["1"], ["3"], ["2", "5"]])
def test_odd_numbers_of_engines_are_refused(counts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        proxy_tier.main(["--engine-counts", *counts])
    assert ended.value.code == 2 and "must be even" in capsys.readouterr().err


async def test_everything_in_small() -> None:
    given = argparse.Namespace(
        proxies=[1], engine_counts=[2], choices=[2], requests=40, connections=2, rounds=1, idle=0.1
    )
    found = await proxy_tier.run(given)
    assert len(found["throughput"]) == 1 and len(found["idle"]) == 1 and found["each_engine"] == {}
