"""The policy simulation in small: it counts right, repeats itself, and its engines do what the text says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.policies import report
from bench.policies.engines import COMMUNICATOR, PREFILL, Decode, Job, Prefill
from bench.policies.trial import Setup, Trial
from bench.policies.workloads import NAMES, arrivals, trace
from bench.virtual.clock import VirtualLoop


def ran(work: Callable[[VirtualLoop], None]) -> float:
    loop = VirtualLoop()
    work(loop)
    with pytest.raises(RuntimeError, match="everybody waits"):
        loop.run_forever()
    loop.close()
    return loop.now


def job(first: int, blocks: int, output: int = 1) -> Job:
    return Job(tuple(range(first, first + blocks)), 64, blocks * 64, output)


def test_a_prefix_is_computed_once() -> None:
    done: list[float] = []

    def work(loop: VirtualLoop) -> None:
        engine = Prefill(loop, 10**6)
        for _ in range(2):
            one = job(1, 20)
            one.done_prefill = lambda: done.append(loop.time())
            loop.call_at(float(len(jobs)), engine.submit, one)
            jobs.append(one)

    jobs: list[Job] = []
    ran(work)
    cold, warm = done[0], done[1] - 1
    assert cold == pytest.approx(PREFILL.request_seconds + PREFILL.step([(1280, 0)], 0, 0))
    assert jobs[1].hits == 1279 and warm == pytest.approx(PREFILL.request_seconds + PREFILL.step([(1, 1279)], 0, 0))


def test_a_full_cache_drops_what_was_not_used() -> None:
    def work(loop: VirtualLoop) -> None:
        engine = Prefill(loop, 40 * 64)
        for at, one in enumerate(jobs):
            loop.call_at(float(at), engine.submit, one)

    jobs = [job(1, 20), job(100, 20), job(1, 20), job(200, 20), job(1, 20), job(100, 20)]
    ran(work)
    assert [one.hits > 0 for one in jobs] == [False, False, True, False, True, False]


def test_the_first_transfer_of_a_pair_makes_a_communicator() -> None:
    arrived: list[float] = []

    def work(loop: VirtualLoop) -> None:
        prefill, decode = Prefill(loop, 10**6), Decode(loop)
        for at in (0.0, 10.0):
            one = job(1, 20, output=3)
            one.first_token = lambda at=at: arrived.append(loop.time() - at)  # type: ignore[misc]
            loop.call_at(at, prefill.send, one, decode)

    ran(work)
    assert arrived[0] - arrived[1] == pytest.approx(COMMUNICATOR)


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    def figures(seed: int) -> dict[str, float]:
        trial = Trial(Setup("prefix_aware", "joint", prefills=2, decodes=2), seed)
        trial.run(arrivals("mixed", seed, 8.0, 60_000))
        return trial.figures(2.0)

    assert figures(1) == figures(1) != figures(2)


@pytest.mark.parametrize("name", NAMES)
def test_workloads_ask_for_what_they_say(name: str) -> None:
    sessions = arrivals(name, 1, 400.0, 50_000)
    asked = sum(ask.tokens for session in sessions for ask in session)
    assert 0.6 < asked / (400 * 50_000) < 1.5


def test_a_trace_is_replayed_at_the_rate_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 3000 * n, "input_length": 1000, "output_length": 5, "hash_ids": [0, n]} for n in range(100)]
    file.write_text("\n".join(map(json.dumps, rows)))
    sessions = trace(file, 10.0, 5000)
    assert len(sessions) == 50 and sessions[-1][0].at == pytest.approx(10.0)
    trial = Trial(Setup("prefix_aware", "joint"), 0)
    trial.run(sessions)
    assert trial.figures(0.0)["hit_rate"] > 0.3


def test_prefix_aware_finds_more_and_gives_everything_back() -> None:
    rates = {}
    for policy in ("round_robin", "prefix_aware"):
        trial = Trial(Setup(policy, "joint"), 1)
        trial.run(arrivals("tenants", 1, 20.0, 200_000))
        rates[policy] = trial.figures(10.0)["hit_rate"]
        for instance in trial.registry.instances():
            assert instance.idle and not instance.tokens_in_flight and not instance.kv_waiting_tokens
    assert rates["prefix_aware"] > rates["round_robin"] + 0.1


def test_the_report_joins_seeds_and_draws() -> None:
    figures = {"ttft_p50_ms": 10.0, "ttft_p99_ms": 20.0, "itl_p99_ms": 5.0, "hit_rate": 0.5,
               "prefill_balance": 1.0, "decode_balance": 1.0}  # fmt: skip
    trials = [
        {"workload": "chat", "load": "low", "rate": 1000, "policy": policy, "seed": seed,
         "figures": {**figures, "ttft_p50_ms": value * (1 + seed)}}
        for policy, value in (("round_robin/round_robin", 10.0), ("prefix_aware/joint", 5.0)) for seed in range(3)
    ]  # fmt: skip
    rows = report.joined(trials)
    assert [row["ttft_p50_ms"] for row in rows] == [20.0, 10.0]
    assert report.geometric(rows, "ttft_p50_ms") == {"round_robin/round_robin": 1.0, "prefix_aware/joint": 0.5}
    assert "| **10** |" in report.markdown(rows)
    assert report.bars(rows, "ttft_p50_ms", "TTFT & more", relative=True).count("<rect") == 5
