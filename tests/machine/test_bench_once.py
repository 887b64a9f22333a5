"""`bench --once`: a small load and what clients see, and vLLM's own benchmark."""

from __future__ import annotations

import threading
from typing import Any

from disagg_machine.bench import load, once
from disagg_machine.service_client import Answer, Failed
from tests.machine.bench_parts import NEW, option
from tests.machine.conftest import MakeContext


def answers(number: int) -> Answer:
    if number == 3:
        raise Failed("HTTP 503")
    return Answer("", 0.1 * (number + 1), 0.05, 1 + number)


def test_a_load_and_what_clients_see() -> None:
    found = load.send(answers, 11, 4)
    assert (len(found.answers), list(found.failures)) == (10, ["HTTP 503"]) and found.seconds > 0
    lines = load.Load(found.answers, found.failures, 2.0).lines()
    assert lines[:5] == [
        "requests answered        10",
        "requests failed          1",
        "duration                 2.00 s",
        "requests per second      5.00",
        "output tokens per second 31.0",
    ]
    assert lines[5] == "TTFT (ms)                p50 50.0  p90 50.0  p99 50.0"
    assert lines[7] == "whole request (ms)       p50 700.0  p90 1100.0  p99 1100.0"
    assert len(load.Load([], ["x"], 1.0).lines()) == 3
    assert [line[:4] for line in load.Load([Answer("", 1, 1, 1)], [], 1.0).lines()[5:]] == ["TTFT", "whol"]


def test_requests_are_in_flight_at_once() -> None:
    together = threading.Barrier(3, timeout=20)

    def wait(number: int) -> Answer:
        together.wait()
        return Answer("", 1, 1, 1)

    assert len(load.send(wait, 6, 3).answers) == 6


def test_prompts_are_the_same_in_every_run() -> None:
    bodies: list[dict[str, Any]] = []

    class Fake:
        def stream(self, path: str, body: dict[str, Any]) -> Answer:
            bodies.append(body)
            return Answer("", 1, 1, 1)

    for _ in range(2):
        send = load.streams(Fake(), "m", 5, 7)  # type: ignore[arg-type]
        send(0)
        send(1)
    assert bodies[:2] == bodies[2:] and bodies[0]["prompt"] != bodies[1]["prompt"]
    assert len(bodies[0]["prompt"].split()) == 5 and bodies[0]["max_tokens"] == 7


def test_vllms_own_benchmark(make_context: MakeContext) -> None:
    words = once.vllm_words(make_context(BENCH_REQUESTS="7").settings, NEW, "http://127.0.0.1:1")
    assert words[:5] == ["/a b/vllm", "bench", "serve", "--base-url", "http://127.0.0.1:1"]
    assert option(words, "--num-prompts") == ["7"] and option(words, "--max-concurrency") == ["16"]
    assert option(words, "--model") == ["model"] and option(words, "--tokenizer") == ["org/model"]
