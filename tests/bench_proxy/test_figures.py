"""From slices to figures and tables: the pure parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.proxy import plot, report, short, table
from bench.proxy.goals import Goal, against_fastest, goals, sentence
from bench.proxy.slices import clean, figures, floor_us, percentiles
from bench.proxy.summary import Figure, added, figure, ratio
from bench.proxy.workloads import WORKLOADS


def a_slice(**changes: Any) -> dict[str, Any]:
    """A clean second: the proxy has 0.5 s of its core, load and engine 0.6 s of theirs."""
    return {
        "seconds": 1.0,
        "requests": 1000,
        "tokens": 5000,
        "open": 10,
        "rss_kb": 2048,
        "proxy": [0.3, 0.2],
        "load": [0.1, 0.2],
        "engine": [0.1, 0.2],
        "busy": [0.52, 0.65],
        "stolen": [0.0, 0.0],
        "ttft": [],
        "delay": [[10, 1]],
        "latency": [],
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "cpu", "delay"),
    [
        ({}, True, True),
        ({"busy": [0.57, 0.65]}, True, True),
        ({"busy": [0.60, 0.65]}, False, False),
        ({"busy": [0.52, 0.80]}, True, False),
        ({"busy": [0.52, 1.30]}, False, False),
        ({"stolen": [0.1, 0.0]}, True, False),
        ({"stolen": [0.4, 0.3]}, False, False),
    ],
)
def test_what_a_clean_second_is(changes: dict[str, Any], cpu: bool, delay: bool) -> None:
    one = a_slice(**changes)
    assert bool(clean([one], "cpu")) is cpu
    assert bool(clean([one], "delay")) is delay


def test_delays_need_a_clean_second_before() -> None:
    busy = a_slice(busy=[0.52, 1.0])
    good, after, later = a_slice(), a_slice(), a_slice()
    assert clean([good, busy, after, later], "delay") == [good, later]
    assert clean([good, busy, after, later], "cpu") == [good, busy, after, later]


def test_figures_take_clean_seconds_only() -> None:
    noisy = a_slice(proxy=[5.0, 5.0], busy=[99, 0], requests=1)
    found = figures([a_slice(), noisy, a_slice(requests=3000)], "request")
    assert found["cpu_us"] == pytest.approx(1e6 * 1.0 / 4000)
    assert (found["rate"], found["seconds"], found["clean"]) == (2000, 3, 2)
    assert found["system_share"] == pytest.approx(0.4)
    assert figures([noisy], "request")["cpu_us"] is None
    assert figures([noisy], "request", all_of_them=True)["cpu_us"] == pytest.approx(1e7)


def test_memory_is_the_most_with_all_streams_open() -> None:
    found = figures([a_slice(), a_slice(rss_kb=4096, open=9)], "stream")
    assert (found["rss_kb"], found["open"]) == (4096, 9) and "cpu_us" not in found


def test_percentiles_over_several_seconds() -> None:
    assert percentiles([]) is None
    found = percentiles([[[1, 98]], [[5, 1], [100, 1]]])
    assert found == {"n": 100, "p50": 0.1, "p99": 0.5}
    assert floor_us(128) == 12.8 and floor_us(128 + 64) == 25.6 and floor_us(129) == 13.0


def runs(**cpu: list[float | None]) -> list[dict[str, Any]]:
    """Of W1, round by round."""
    return [
        {"peer": peer, "workload": "W1", "round": turn, "cpu_us": value, "seconds": 4, "idle_kb": 1024}
        for peer, values in cpu.items()
        for turn, value in enumerate(values)
    ]


def test_ratios_are_made_round_by_round() -> None:
    of = runs(ours=[10, 40, 90], other=[20, 40, 100])
    assert ratio(of, "W1", "cpu_us", "other") == Figure(0.9, 0.5, 1.0, 3)
    assert figure(of, "ours", "W1", "cpu_us") == Figure(40, 10, 90, 3)
    assert added(runs(ours=[10, 40], direct=[2, None]), "ours", "W1", "cpu_us") == Figure(8, 8, 8, 1)


def test_a_round_without_a_clean_second_is_left_out() -> None:
    assert ratio(runs(ours=[10, None], other=[20, 1]), "W1", "cpu_us", "other") == Figure(0.5, 0.5, 0.5, 1)
    assert ratio(runs(ours=[None], other=[1]), "W1", "cpu_us", "other") is None


def results() -> dict[str, Any]:
    machine = {"cpu": "X", "cores": 2, "proxy_core": 0, "load_core": 1, "kernel": "6", "python": "3.11", "gcc": "12"}
    return {
        "date": "2026-01-01",
        "machine": machine,
        "versions": {"quart": "1"},
        "titles": {"ours": "this proxy", "other": "another"},
        "runs": runs(ours=[10, 10], other=[20, 40]),
        "skipped": {"third": "no network"},
        "cpu_clean": 0.5,
        "delay_clean": 0.25,
    }


def test_the_tables() -> None:
    text = report.tables(results())
    assert "| another | 0.38 (0.25–0.50) |" in text
    assert "| this proxy | 10.0 (10.0–10.0) |" in text and "| another | 30.0 (20.0–40.0) |" in text
    assert "not measured: third: no network" in text and "50% of all measured seconds" in text


def test_this_proxy_compiled_is_compared_by_itself() -> None:
    of = results()
    of["titles"]["ours-compiled"] = "this proxy, compiled"
    of["runs"] = runs(ours=[10, 10], other=[20, 40], **{"ours-compiled": [5, 5]})
    python, _, native = report.tables(of).partition("CPU of this proxy, compiled, as a ratio")
    assert "| another | 0.38 (0.25–0.50) |" in python
    assert "| another | 0.19 (0.12–0.25) |" in native and "| this proxy, compiled | 5.00 (5.00–5.00) |" in native


def test_several_results_are_one(tmp_path: Path) -> None:
    for name, cpu in (("a", 10), ("b", 30)):
        one = {**results(), "runs": [{**run, "clean": 2, "clean_delay": 1} for run in runs(ours=[cpu], other=[20])]}
        (tmp_path / name).write_text(json.dumps({**one, "titles": {**one["titles"], name: name}}))
    merged = report.load([tmp_path / "a", tmp_path / "b"])
    assert ratio(merged["runs"], "W1", "cpu_us", "other") == Figure(1.0, 0.5, 1.5, 2)
    assert {"a", "b", "ours"} <= merged["titles"].keys() and merged["cpu_clean"] == 0.5
    assert "2 round(s)" in report.tables(merged)


def test_delays_are_added_ones_where_clients_without_a_proxy_are_known() -> None:
    paced = [
        {"peer": peer, "workload": workload, "round": 0, "seconds": 4, "delay_us": {"p50": us, "p99": us}}
        for peer, workload, us in (("direct", "W3_128", 1e3), ("ours", "W3_128", 5e3), ("ours", "W3_256", 7e3))
    ]
    text = report.tables({**results(), "runs": paced})
    assert "| W3_128 delay of a token, p50 | 1.00 | 4.00 |" in text
    assert "| W3_256 delay of a token, p50 | – | 7.00 in all |" in text


def test_the_page_keeps_what_is_around_the_figures() -> None:
    page = f"above\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nbelow\n"
    filled = report.put(page, "new")
    assert filled.startswith("above\n") and filled.endswith("\nbelow\n") and "new" in filled and "old" not in filled
    assert report.put(filled, "new") == filled
    with pytest.raises(ValueError, match="no marks"):
        report.put("a page", "new")


def test_bars_are_multiples_of_this_proxy() -> None:
    assert plot.bars(results()) == {"ours": {"W1": 1.0}, "other": {"W1": 3.0}}


@pytest.mark.parametrize(("ratios", "good"), [([0.5, 0.6, 9.0], True), ([0.5, 0.7, 0.9], False), ([0.6], True)])
def test_the_verdict_of_ci(ratios: list[float], good: bool) -> None:
    assert short.verdict(ratios, expected=0.5, noise=0.25)[0] is good


def test_memory_is_measured_before_anything_else() -> None:
    kinds = [load.memory for load in WORKLOADS.values()]
    assert kinds == sorted(kinds, reverse=True) and any(kinds)


def test_the_fastest_peer_of_a_column_counts() -> None:
    of = runs(ours=[10, 10], slow=[40, 40], quick=[20, 25], reference=[1, 1], direct=[1, 1])
    found = against_fastest(of, "ours", "W1")
    assert found == ("quick", Figure(0.45, 0.4, 0.5, 2))
    assert against_fastest(runs(ours=[10]), "ours", "W1") is None


def test_goals_say_what_is_missed() -> None:
    of = results()
    of["titles"] = {name: name for name in ("ours", "ours-compiled", "other")}
    of["runs"] = runs(ours=[12, 12], other=[10, 10], **{"ours-compiled": [4, 4]})
    assert [one.met for one in goals(of, "ours")] == [False] and [one.met for one in goals(of, "ours-compiled")] == [
        True
    ]
    text = report.tables(of)
    assert "ours-compiled: 1 of 1 goals are met." in text and "ours: 0 of 1 goals are met, all but:" in text
    assert "| W1, CPU | other | 1.20 (1.20–1.20) | 1.00 |" in text
    assert sentence(of) == ""


def test_delays_are_compared_with_what_the_best_peer_adds() -> None:
    def delays(peer: str, ms: float) -> dict[str, Any]:
        point = {"p50": 1000 * ms, "p99": 1000 * ms}
        return {"peer": peer, "workload": "W3_128", "round": 1, "seconds": 4, "ttft_us": point, "delay_us": point}

    of = {
        "runs": [delays(*one) for one in (("direct", 1), ("ours", 3), ("a", 4), ("b", 2.5))],
        "titles": {"a": "A", "b": "B"},
    }
    first = next(iter(goals(of, "ours")))
    assert first == Goal("W3_128, added TTFT, p50, ms", "B", Figure(2, 2, 2, 1), 1.5) and not first.met


def test_the_sentence_names_peers_and_figures() -> None:
    of = results()
    of["titles"] = {"ours": "this proxy", "x": "x 1 (Rust)", "y": "y 2 (Rust)"}
    of["runs"] = [
        {**run, "workload": workload}
        for workload in ("W1", "W3_128", "W4_64k")
        for run in runs(ours=[10], x=[20], y=[40])
    ]
    said = sentence(of)
    assert said.startswith("Beside x 1 and y 2: as Python it takes 0.50 of the CPU") and said.endswith("of 64 KiB.")


def test_the_reduced_table_has_all_columns_but_one() -> None:
    loads = {load.name: load for load in table.chosen_loads(is_short=True)}
    assert loads.keys() == WORKLOADS.keys() - {"M1000"}
    for name, load in loads.items():
        whole = WORKLOADS[name]
        assert (load.clients, load.tokens, load.body, load.api) == (whole.clients, whole.tokens, whole.body, whole.api)
        assert load.longest <= 8 and load.warmup >= load.ramp
