"""The comparison of placements on two GPUs: its figures by hand, its commands, and a short run on simulated engines."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bench.gpu_elastic import __main__ as command
from bench.gpu_elastic import plan, run
from bench.gpu_elastic.figures import figures, table
from bench.gpu_elastic.plan import LEAST, MOST, seconds_for, windows
from bench.gpu_elastic.run import ARMS, ArmWorkload
from bench.gpu_elastic.stack import ElasticStack
from bench.gpu_latency.processes import Machine
from disagg_report.records import Shot
from disagg_report.slo import Slo

SLO = Slo(400.0, 10.0, 0.9)


def shot(ttft: float, *gaps: float) -> Shot:
    return Shot(0.0, ttft, gaps, ttft + sum(gaps), 2000, len(gaps) + 1)


def test_figures_of_a_window() -> None:
    shots = [shot(100, 5, 5, 30), shot(50, 5, 5, 5), shot(500, 5, 5, 5), Shot(error="HTTP 503")]
    found = figures(shots, SLO)
    assert (found["sent"], found["answered"], found["good"]) == (4, 3, 0.25)
    assert (found["ttft_p50"], found["ttft_p99"]) == (100, 500)
    assert found["tpot_p99"] == pytest.approx(40 / 3, abs=0.01)
    assert (found["gap_p99"], found["longest_gap_p99"]) == (30, 30)
    assert figures([], SLO)["good"] is None and figures([], SLO)["ttft_p50"] is None


def test_each_arm_is_first_in_one_of_three_rounds() -> None:
    every = windows(3, [12, 24], ("a", "b", "c"))
    assert [[(one.rate, one.arm) for one in each[:3]] for each in every] == [
        [(12, "a"), (12, "b"), (12, "c")], [(12, "b"), (12, "c"), (12, "a")], [(12, "c"), (12, "a"), (12, "b")],
    ]  # fmt: skip
    assert [one.rate for one in every[0]] == [12] * 3 + [24] * 3 and {one.round for one in every[2]} == {3}


@pytest.mark.parametrize(
    ("left", "expected"),
    [(3 * 12 * 8.0, 5.0), (3 * 12 * 100.0, MOST), (12 * 9.0, 6.0), (12 * (LEAST + 2.9), 0.0), (0, 0.0), (-5, 0.0)],
    ids=["three rounds", "long enough", "one round", "too little", "nothing", "late"],
)
def test_rounds_at_the_end_give_way(left: float, expected: float) -> None:
    assert seconds_for(left, 3, 12, 3.0) == pytest.approx(expected)


def test_arms_get_the_same_arrivals_and_other_prompts() -> None:
    one, two = (ArmWorkload("m", 100, 4, 5.0, 7, arm=arm) for arm in ("split", "elastic"))
    assert one.arrival_times(10) == two.arrival_times(10)
    bodies = [work.bodies(work.dice(10), 3) for work in (one, two)]
    begins = {json.loads(body)["prompt"][0:16].__repr__() for some in bodies for body in some}
    assert len(begins) == 6, "no block is in a prefix cache"
    assert one.bodies(random.Random(1), 2) == one.bodies(random.Random(1), 2)


def test_the_processes_of_a_run(tmp_path: Path) -> None:
    size = ("--kv-cache-memory-bytes", "40G")
    machine = Machine("/m", "own", "vllm", "python3", tmp_path, 1, kv_buffer=0, arguments=size)
    stack = ElasticStack(machine, ("0", "1"), (400.0, 10.0))
    assert [one.environment["PLACEMENT"] for one in stack.proxies] == ["split", "elastic"]
    assert {one.environment["SLO_TTFT_MS"] for one in stack.proxies} == {"400"}
    passed_on = stack.proxy.command[stack.proxy.command.index("--forward-registrations") + 1]
    assert passed_on.endswith(stack.elastic.command[stack.elastic.command.index("--zmq-port") + 1])
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in stack.engines] == ["0", "1", "0", "1"]
    assert ["--kv-transfer-config" in one.command for one in stack.engines] == [True, True, False, False]
    assert all(one.command[-2:] == list(size) for one in stack.engines)
    assert len({one.port for one in stack.processes}) == 6 and len({one.log for one in stack.processes}) == 6
    assert len(stack.urls("plain")) == 2 and stack.urls("split") != stack.urls("elastic")


def test_the_table_pools_the_rounds() -> None:
    lines = [
        {"step": "about", "engines": "vllm", "gpus": ["0", "1"], "notes": ["REHEARSAL"]},
        {"step": "ttft", "tokens": 1000, "requests": 30, "arms": {"plain": 40.0, "split": 61.25, "elastic": None}},
        *({"step": "window", "round": number, "rate": 12.0, "arm": "elastic", "answered": 2, "joules": 100.0 * number,
           "joules_idle": 20.0, "recomputed": number, "placed": {"split": 3, "alone": 1}} for number in (1, 2)),
        {"step": "note", "why": "nothing is placed"},
        {"step": "skipped", "why": "round 3: 1 s was left"},
    ]  # fmt: skip
    requests = [
        ({"rate": 12.0, "arm": "elastic"}, [shot(100, 5), shot(200, 5)]),
        ({"rate": 12.0, "arm": "elastic"}, [shot(300, 5), shot(600, 5)]),
    ]
    text = table(lines, requests, SLO)
    assert "**REHEARSAL**" in text and "| 1,000 tokens | 40.0 | 61.2 | – | 30 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| 12 |"))
    assert row == ("| 12 | elastic | 0.750 | 200 / 600 | 5.0 / 5.0 | 5 | 0 | 3 | split 75%, alone 25% | 75.0 (65.0) |")
    assert text.endswith("\nNote: nothing is placed\n\nSkipped: round 3: 1 s was left\n")


def test_a_short_run_on_simulated_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LEAST", 0.2)
    monkeypatch.setattr(plan, "MOST", 1.0)
    monkeypatch.setattr(run, "PATIENCE", 60.0)
    arguments = [
        "--engines", "sim", "--out", str(tmp_path), "--limit", "240", "--rates", "6,9", "--rounds", "1",
        "--tokens", "300", "--answer", "4", "--lengths", "200", "--singles", "2",
        "--engine-argument=--time-per-output-token", "--engine-argument=0.002",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = [(line["rate"], line["arm"]) for line in lines if line["step"] == "window"]
    assert found == [(rate, arm) for rate in (6.0, 9.0) for arm in ARMS]
    assert all(line["sent"] >= 2 and not line["errors"] for line in lines if line["step"] == "window")
    (single,) = [line for line in lines if line["step"] == "ttft"]
    assert single["tokens"] == 200 and set(single["arms"]) == set(ARMS)
    text = (tmp_path / "table.md").read_text()
    assert "SIMULATED" in text and text.count("| 6 | elastic |") == text.count("| 9 | elastic |") == 1
    assert command.main(["--report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text() == text


def test_an_engine_that_does_not_start_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    arguments = ["--engines", "sim", "--limit", "120", "--out", str(tmp_path), "--engine-argument=--no-such-flag"]
    assert command.main(arguments) == 1
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    error = next(line for line in lines if line["step"] == "error")
    assert "NotReady" in error["why"] and "--no-such-flag" in error["why"]
