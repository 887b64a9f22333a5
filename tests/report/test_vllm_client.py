"""`vllm bench serve` as load generator, with a program in its place that writes what it writes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from disagg_report.arrivals import Workload
from disagg_report.client import ClientFailed
from disagg_report.vllm_client import VllmClient, shots_of

WORKLOAD = Workload("served", input_tokens=100, output_tokens=4, seconds=2, seed=5)

# Of vLLM 0.26 with --save-detailed, two requests, the second failed.
RESULT: dict[str, Any] = {
    "duration": 2.5,
    "completed": 1,
    "request_throughput": 0.4,
    "input_lens": [100, 100],
    "output_lens": [4, 0],
    "ttfts": [0.05, 0.0],
    "itls": [[0.01, 0.01, 0.02], []],
    "latencies": [0.09, 0.0],
    "start_times": [1000.0, 1000.5],
    "generated_texts": ["secret", ""],
    "errors": ["", "Traceback (most recent call last):\n  ...\nValueError: no"],
}

PROGRAM = """\
import json, os, sys, time
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps({"argv": words, "key": os.environ.get("OPENAI_API_KEY"), "pid": os.getpid()}) + "\\n")
mode = os.environ.get("MODE", "")
if mode == "fails":
    sys.exit("it is broken")
if mode == "hangs":
    time.sleep(600)
value = lambda flag: words[words.index(flag) + 1]
print("Starting main benchmark run...", flush=True)
sys.stderr.write("\\r 50%|#####     | 1/2 [00:01<00:01]")
sys.stderr.write("\\r100%|##########| 2/2 [00:02<00:00]\\n")
sys.stderr.flush()
time.sleep(0.05)
print("============ Serving Benchmark Result ============", flush=True)
if mode != "silent":
    with open(os.path.join(value("--result-dir"), value("--result-filename")), "w") as file:
        file.write(os.environ["RESULT"] if mode != "garbage" else "{")
"""


class Stub:
    """A stand-in for vLLM's command line, and how it was called."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "vllm.py"
        self.program.write_text(PROGRAM)
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        self.folder = folder / "setup"
        self.folder.mkdir()

    def client(self, *urls: str, key: str = "") -> VllmClient:
        words = [sys.executable, str(self.program)]
        return VllmClient(
            words, "0.26.0", urls, WORKLOAD, "/models/m", ["ttft:100", "tpot:20"], self.folder, key
        )  # fmt: skip

    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    one = Stub(tmp_path)
    monkeypatch.setenv("CALLS", str(one.calls_file))
    monkeypatch.setenv("RESULT", json.dumps(RESULT))
    return one


async def test_one_rate(stub: Stub) -> None:
    seen: list[tuple[int, int, int]] = []
    client = stub.client("http://127.0.0.1:1", key="k")
    found = await client.measure(4, asyncio.Event(), lambda *now: seen.append(now))
    assert client.name == "vllm bench serve 0.26.0"
    assert (found.rate, found.seconds, len(found.shots)) == (4, 2.5, 2)
    assert seen[-1] == (2, 0, 8)
    window = client.window()
    assert window is not None and window[0] < window[1] <= time.monotonic()
    (call,) = stub.calls()
    words = call["argv"]
    assert call["key"] == "k" and words[:2] == ["bench", "serve"]
    given = {
        word: words[words.index(word) + 1] for word in words if word.startswith("--") and word != "--save-detailed"
    }
    assert given["--request-rate"] == "4" and given["--num-prompts"] == "8" and given["--model"] == "served"
    assert given["--tokenizer"] == "/models/m" and given["--base-url"] == "http://127.0.0.1:1"
    assert words[words.index("--goodput") + 1 :][:2] == ["ttft:100", "tpot:20"]
    kept = json.loads((stub.folder / "vllm-rate-0004.000.json").read_text())
    assert kept["request_throughput"] == 0.4 and "generated_texts" not in kept
    assert "Starting main benchmark run" in (stub.folder / "vllm-bench.log").read_text()


def test_its_requests() -> None:
    good, bad = shots_of(RESULT)
    assert good.answered and good.sent == 0 and good.ttft_ms == 50 and good.itl_ms == (10, 10, 20)
    assert good.tpot_ms == pytest.approx(40 / 3) and good.output_tokens == 4 and good.prompt_tokens == 100
    assert not bad.answered and bad.error == "ValueError: no" and bad.sent == 0.5


def test_older_versions_leave_out_when_it_was_sent() -> None:
    older = {name: value for name, value in RESULT.items() if name not in ("latencies", "start_times")}
    good, bad = shots_of(older)
    assert good.sent is None and good.latency_ms == pytest.approx(90) and not bad.answered


@pytest.mark.parametrize("name", ["ttfts", "itls", "errors", "output_lens", "input_lens"])
def test_an_unknown_result_format_is_an_error(name: str) -> None:
    with pytest.raises(ClientFailed, match="unknown format"):
        shots_of({key: value for key, value in RESULT.items() if key != name})
    with pytest.raises(ClientFailed, match="unknown format"):
        shots_of({**RESULT, name: RESULT[name][:1]})


async def test_several_engines_are_one_measurement(stub: Stub) -> None:
    found = await stub.client("http://a", "http://b").measure(4, asyncio.Event(), lambda *now: None)
    assert len(found.shots) == 4
    calls = [call["argv"] for call in stub.calls()]
    assert {words[words.index("--base-url") + 1] for words in calls} == {"http://a", "http://b"}
    assert {words[words.index("--request-rate") + 1] for words in calls} == {"2"}
    assert len({words[words.index("--seed") + 1] for words in calls}) == 2


@pytest.mark.parametrize(
    ("mode", "why"),
    [("fails", "exited with code 1"), ("silent", "without a result"), ("garbage", "no JSON")],
)
async def test_what_goes_wrong_is_named(stub: Stub, monkeypatch: pytest.MonkeyPatch, mode: str, why: str) -> None:
    monkeypatch.setenv("MODE", mode)
    with pytest.raises(ClientFailed, match=why):
        await stub.client("http://a", "http://b").measure(4, asyncio.Event(), lambda *now: None)


async def test_a_program_that_is_not_there(stub: Stub) -> None:
    client = VllmClient(["/nowhere/vllm"], "", ["http://a"], WORKLOAD, "t", [], stub.folder)
    with pytest.raises(ClientFailed, match="/nowhere/vllm"):
        await client.measure(4, asyncio.Event(), lambda *now: None)


async def test_stopped_it_leaves_no_process(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODE", "hangs")
    stop = asyncio.Event()
    work = asyncio.create_task(stub.client("http://a").measure(4, stop, lambda *now: None))
    while not stub.calls():
        assert not work.done()
        await asyncio.sleep(0.02)
    stop.set()
    found = await work
    assert found.interrupted and found.shots == ()
    with pytest.raises(ProcessLookupError):
        os.kill(stub.calls()[0]["pid"], 0)


async def test_prompts_differ_from_rate_to_rate(stub: Stub) -> None:
    client = stub.client("http://a")
    for rate in (1, 2):
        await client.measure(rate, asyncio.Event(), lambda *now: None)
    assert len({call["argv"][call["argv"].index("--seed") + 1] for call in stub.calls()}) == 2
