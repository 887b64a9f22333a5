"""`bench`: what is compared, and the words of each measurement."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg_machine import bench
from disagg_machine.bench import plan
from disagg_machine.engines import SIM, VLLM
from disagg_machine.gpus import Gpu
from disagg_machine.parts import Part
from disagg_machine.settings import Settings
from disagg_machine.vllm_facts import VllmFacts
from tests.machine.bench_parts import NEW, option, part, refused
from tests.machine.conftest import MakeContext

GPUS = [Gpu(index, f"GPU-{index}", "Stub", 80000, 80000) for index in range(5)]


# -- what is compared


@pytest.mark.parametrize(
    ("environ", "ratio", "kind", "expected"),
    [
        ({}, False, VLLM, ["0", "1"]),
        ({"TENSOR_PARALLEL": "2"}, False, VLLM, ["0+1", "2+3"]),
        ({"BENCH_SIM_ENGINES": "3"}, True, SIM, ["0", "1", "2"]),
        ({}, True, VLLM, ["0", "1", "2", "3", "4"]),
        ({"TENSOR_PARALLEL": "2"}, True, VLLM, ["0+1", "2+3"]),
        ({"PREFILL_GPUS": "4,GPU-2", "DECODE_GPUS": "0"}, True, VLLM, ["4", "GPU-2", "0"]),
    ],
)
def test_the_pool(
    make_context: MakeContext, environ: dict[str, str], ratio: bool, kind: str, expected: list[str]
) -> None:
    assert plan.pool(make_context(**environ).settings, ratio, kind, GPUS) == expected


@pytest.mark.parametrize(
    ("environ", "ratio", "kind", "key", "argument"),
    [
        ({"BENCH_SIM_ENGINES": "1"}, True, SIM, "bench_pool_small", 1),
        ({"TENSOR_PARALLEL": "4"}, True, VLLM, "bench_pool_small", 1),
        ({"PREFILL_GPUS": "0", "DECODE_GPUS": "0,1"}, True, VLLM, "bench_pool_twice", "0"),
        ({"PREFILL_GPUS": "0+1", "DECODE_GPUS": "2+1"}, False, SIM, "bench_pool_twice", "1"),
    ],
)
def test_pools_that_cannot_be_compared(
    make_context: MakeContext, environ: dict[str, str], ratio: bool, kind: str, key: str, argument: object
) -> None:
    with refused(key, argument):
        plan.pool(make_context(**environ).settings, ratio, kind, GPUS)


def test_the_splits_of_a_pool() -> None:
    assert plan.splits(["0", "1", "2"]) == [(["0"], ["1", "2"]), (["0", "1"], ["2"])]


# -- one measurement


def sweep(settings: Settings, kind: str, facts: VllmFacts | None, client: str, *parts: Part) -> list[str]:
    setup = plan.pd_setup("p1d2", "ratio", 1, 2, "http://127.0.0.1:1")
    return plan.sweep_words(settings, setup, Path("/re ports"), kind, facts, client, parts)


def test_a_measurement_of_simulated_engines(make_context: MakeContext) -> None:
    settings = make_context(BENCH_RATES="1 2", EXTRA_SIM_ARGS="--fast", EXTRA_PROXY_ARGS="--log").settings
    words = sweep(settings, SIM, None, "own", part("prefill", kind="sim", gpus="0"))
    assert words[:2] == ["sweep", "/re ports"] and "--simulated" in words and "--vllm" not in words
    expected = {
        "--name": "p1d2",
        "--title": "1 prefill + 2 decode",
        "--kind": "pd",
        "--question": "ratio",
        "--engines": "3",
        "--url": "http://127.0.0.1:1",
        "--model": "model",
        "--tokenizer": "org/model",
        "--client": "own",
        "--rates": "1 2",
        "--seconds": "10",
        "--time-limit": "180",
        "--warm-up": "12",
        "--slo-ttft-ms": "1000",
        "--slo-attainment": "0.9",
    }
    assert {name: option(words, name) for name in expected} == {name: [value] for name, value in expected.items()}
    assert option(words, "--gpus") == []
    assert option(words, "--fact") == ["Engines=SIMULATED", "EXTRA_SIM_ARGS=--fast", "EXTRA_PROXY_ARGS=--log"]


def test_a_measurement_of_vllms_engines(make_context: MakeContext) -> None:
    settings = make_context(BENCH_SECONDS="7").settings
    engine = {"kind": "vllm", "connector": "own"}
    parts = [
        part("proxy", kind="proxy"),
        part("prefill", gpus="0,1", **engine),
        part("decode1", gpus="2", **engine),
        part("decode2", gpus="3", **engine),
    ]
    words = sweep(settings, VLLM, NEW, "vllm", *parts)
    assert "--simulated" not in words
    assert option(words, "--vllm") == ["'/a b/vllm'"] and option(words, "--vllm-version") == ["0.33.0"]
    assert option(words, "--seconds") == ["7"] and option(words, "--time-limit") == ["900"]
    assert option(words, "--gpus") == ["prefill=0,1", "decode=2,3"]
    facts = dict(fact.split("=", 1) for fact in option(words, "--fact"))
    assert facts["vLLM"] == "0.33.0" and facts["KV connector"] == "own" and facts["MODEL"] == "org/model"
    assert facts["MAX_NUM_BATCHED_TOKENS"] == "10000" and "EXTRA_PLAIN_ARGS" not in facts


def test_disagg_report_understands_the_words(make_context: MakeContext) -> None:
    from disagg_report.cli import _parser

    for words in (sweep(make_context().settings, SIM, None, "own"), sweep(make_context().settings, VLLM, NEW, "vllm")):
        assert _parser().parse_args(words).command == "sweep"
    assert _parser().parse_args(["write", "/re ports"]).command == "write"


@pytest.mark.parametrize(
    ("setting", "kind", "facts", "expected"),
    [
        ("auto", VLLM, NEW, "vllm"),
        ("auto", SIM, NEW, "own"),
        ("auto", VLLM, None, "own"),
        ("own", VLLM, NEW, "own"),
        ("vllm", SIM, NEW, "vllm"),
        ("vllm", SIM, None, ""),
    ],
)
def test_the_load_generator(
    make_context: MakeContext, setting: str, kind: str, facts: VllmFacts | None, expected: str
) -> None:
    settings = make_context(BENCH_CLIENT=setting).settings
    if expected:
        assert plan.client(settings, kind, facts) == expected
    else:
        with refused("no_vllm"):
            plan.client(settings, kind, facts)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--fast"], "unknown_argument"),
        (["--once", "--ratio"], "bench_once_alone"),
        (["--against-plain", "--once"], "bench_once_alone"),
    ],
)
def test_wrong_words(make_context: MakeContext, words: list[str], key: str) -> None:
    with refused(key, code=2):
        bench.cmd_bench(make_context(), words)
