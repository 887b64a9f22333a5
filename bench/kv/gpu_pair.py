"""Prefill on GPU 0, decode on GPU 1 and a plain engine: are answers right, and how fast is the hand-over?

    python -m bench.kv.gpu_pair --model DIR [--connector own|p2p_nccl] [--limit 460] > result.json

Needs two GPUs and vLLM; starts ``vllm serve`` three times with CUDA graphs, asks over HTTP without a proxy, and prints
one JSON object, also when the time is over. ``p2p_nccl`` is vLLM's in-tree connector (up to 0.23), for comparison.
Logs and traces go to --folder.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LENGTHS = (5, 16, 17, 100, 161, 1601, 4097, 8001)
ORDERS = ("prefill first", "at once")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Engine:
    def __init__(self, name: str, gpu: int, arguments: argparse.Namespace, role: str) -> None:
        self.name, self.gpu, self.arguments, self.role = name, gpu, arguments, role
        self.port, self.kv_port = _free_port(), _free_port()
        self.log = Path(arguments.folder) / f"{name}.log"
        self.trace = Path(arguments.folder) / f"{name}.trace"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def kv_address(self) -> str:
        return f"127.0.0.1:{self.kv_port}"

    def start(self) -> None:
        a = self.arguments
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", a.model, "--served-model-name", "m",
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "bfloat16",
            "--max-model-len", str(a.max_model_len), "--max-num-batched-tokens", str(a.max_num_batched_tokens),
            "--max-num-seqs", "64", "--gpu-memory-utilization", str(a.gpu_memory_utilization), *a.engine_argument,
        ]  # fmt: skip
        config = self._config()
        if config:
            command += ["--kv-transfer-config", json.dumps(config)]
        environment = {
            **os.environ, "CUDA_VISIBLE_DEVICES": str(self.gpu), "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "DISAGG_KV_TRACE": str(self.trace),
            "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        }  # fmt: skip
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)

    def _config(self) -> dict[str, Any]:
        if not self.role:
            return {}
        if self.arguments.connector == "p2p_nccl":
            return {
                "kv_connector": "P2pNcclConnector", "kv_role": self.role, "kv_port": str(self.kv_port),
                "kv_buffer_size": "1e1" if self.role == "kv_producer" else "8e9",
                "kv_connector_extra_config": {"http_port": str(self.port), "send_type": "PUT_ASYNC",
                                              "nccl_num_channels": "16", "mem_pool_size_gb": "4"},
            }  # fmt: skip
        return {
            "kv_connector": "DisaggKVConnector", "kv_connector_module_path": "disagg_kv.connector",
            "kv_role": self.role, "kv_port": self.kv_port, "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"min_load_tokens": 1, **json.loads(self.arguments.extra)},
        }  # fmt: skip

    def wait(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                break
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)

    def ask(self, body: dict[str, Any], request_id: str = "", stream: bool = False) -> dict[str, Any]:
        """The JSON answer, or for a stream {"ttft": seconds from now to its first event}."""
        headers = {"Content-Type": "application/json", **({"X-Request-Id": request_id} if request_id else {})}
        message = {"model": "m", "temperature": 0, "ignore_eos": True, **body}
        if stream:
            message["stream"] = True
        start = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(message), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{self.name}: {answer.status} {answer.read()[:500]!r}")
        if not stream:
            result: dict[str, Any] = json.loads(answer.read())
            return result
        while not answer.readline().startswith(b"data: {"):
            pass
        first = time.perf_counter() - start
        answer.read()
        return {"ttft": first}

    def loaded_tokens(self) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", "/metrics")
        for line in connection.getresponse().read().decode().splitlines():
            if line.startswith("vllm:prompt_tokens_by_source_total") and 'source="external_kv_transfer"' in line:
                return float(line.rsplit(" ", 1)[1])
        return 0.0


class Pair:
    def __init__(self, prefill: Engine, decode: Engine, own: bool) -> None:
        self.prefill, self.decode, self.own = prefill, decode, own
        self.pool = concurrent.futures.ThreadPoolExecutor(64)

    def ask(self, body: dict[str, Any], order: str, stream: bool = False) -> dict[str, Any]:
        """Decode's answer; a stream's ttft counts from the first leg."""
        name = uuid.uuid4().hex
        first, second, header = {**body, "max_tokens": 1}, dict(body), ""
        first.pop("logprobs", None)
        if self.own:
            first["kv_transfer_params"] = {"transfer_id": name}
            second["kv_transfer_params"] = {"transfer_id": name, "from": self.prefill.kv_address}
        else:
            header = f"___prefill_addr_{self.prefill.kv_address}___decode_addr_{self.decode.kv_address}_{name}"
        start = time.perf_counter()
        if order == "at once" and self.own:
            leg = self.pool.submit(self.prefill.ask, first)
            answer = self.decode.ask(second, stream=stream)
            leg.result()
            return answer
        self.prefill.ask(first, header)
        between = time.perf_counter() - start
        answer = self.decode.ask(second, header, stream)
        if stream:
            answer["ttft"] += between
        return answer


def _first_token(answer: dict[str, Any]) -> dict[str, float]:
    top: dict[str, float] = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return top


def _correct(
    pair: Pair, plain: Engine, orders: tuple[str, ...], prompt: Callable[[int], list[int]], lengths: list[int]
) -> dict[str, Any]:
    """First-token logprobs against the plain engine (bf16: compare with a tolerance), and how many texts are equal."""
    cases = []
    for order in orders:
        for length in lengths:
            body = {"prompt": prompt(length), "max_tokens": 8, "logprobs": 5}
            before = pair.decode.loaded_tokens()
            got, want = pair.ask(body, order), plain.ask(body)
            again = plain.ask(body)
            ours, theirs = _first_token(got), _first_token(want)
            shared = set(ours) & set(theirs)
            cases.append({
                "order": order, "length": length, "loaded": pair.decode.loaded_tokens() - before,
                "difference": max((abs(ours[token] - theirs[token]) for token in shared), default=99.0),
                "plain_with_itself": max(abs(_first_token(again).get(token, -99) - theirs[token]) for token in theirs),
                "shared_of_5": len(shared), "text_equal": got["choices"][0]["text"] == want["choices"][0]["text"],
            })  # fmt: skip
    return {"worst_difference": max(case["difference"] for case in cases), "cases": cases,
            "texts_equal": f"{sum(case['text_equal'] for case in cases)} of {len(cases)}"}  # fmt: skip


def _ttft(ask: Callable[[dict[str, Any]], dict[str, Any]], prompt: Callable[[int], list[int]], length: int,
          repeats: int) -> dict[str, float]:  # fmt: skip
    times = [ask({"prompt": prompt(length), "max_tokens": 8})["ttft"] * 1e3 for _ in range(repeats)]
    return {"median_ms": round(statistics.median(times), 1), "min_ms": round(min(times), 1),
            "max_ms": round(max(times), 1)}  # fmt: skip


def _transfers(prefill: Engine, decode: Engine, tokens: int) -> dict[str, Any]:
    """From the traces: milliseconds from the last layer's end on prefill's GPU to the blocks being on decode, and from
    the first byte (GO) to there."""
    if not prefill.trace.exists() or not decode.trace.exists():
        return {}
    events: dict[str, dict[str, Any]] = {}
    for path in (prefill.trace, decode.trace):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            if "key" in event:
                events.setdefault(event["key"], {})[event["event"]] = event
    complete = [one for one in events.values() if {"go", "sent", "received"} <= one.keys()
                and one["go"]["blocks"] >= tokens // 16]  # fmt: skip
    if not complete:
        return {}
    complete = complete[1:] or complete
    took = sorted((one["received"]["time"] - one["sent"]["computed"]) * 1e3 for one in complete)
    whole = statistics.median((one["received"]["time"] - one["go"]["time"]) * 1e3 for one in complete)
    size = complete[0]["received"]["bytes"]
    return {"count": len(took), "bytes": size, "median_ms": round(statistics.median(took), 2),
            "min_ms": round(took[0], 2), "max_ms": round(took[-1], 2),
            "from_go_ms": round(whole, 2), "overlapped": sum(one["go"]["parts"] for one in complete),
            "gb_per_s_from_go": round(size / whole / 1e6, 1)}  # fmt: skip


def _burst(pair: Pair, prompt: Callable[[int], list[int]], order: str) -> dict[str, Any]:
    bodies = [{"prompt": prompt(900), "max_tokens": 32} for _ in range(48)]
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(48) as pool:
        answers = list(pool.map(lambda body: pair.ask(body, order), bodies))
    return {"requests": len(answers), "seconds": round(time.perf_counter() - start, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--connector", choices=("own", "p2p_nccl"), default="own")
    parser.add_argument("--extra", default="{}", help="JSON: more keys for kv_connector_extra_config")
    parser.add_argument("--engine-argument", action="append", default=[], help="one more argument of vllm serve")
    parser.add_argument("--max-model-len", type=int, default=10000)
    parser.add_argument("--max-num-batched-tokens", type=int, default=10000)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--folder", default="/tmp/disagg-kv")
    parser.add_argument("--limit", type=float, default=460, help="seconds after which what there is is printed")
    arguments = parser.parse_args()
    Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    deadline, own = time.monotonic() + arguments.limit, arguments.connector == "own"
    numbers, longest = random.Random(3), arguments.max_model_len - 16

    def prompt(length: int) -> list[int]:
        return [numbers.randrange(10, 200) for _ in range(length)]

    engines = [Engine("prefill", 0, arguments, "kv_producer"), Engine("decode", 1, arguments, "kv_consumer"),
               Engine("plain", 0, arguments, "")]  # fmt: skip
    prefill, decode, plain = engines
    for engine in engines:
        engine.trace.unlink(missing_ok=True)
    pair, orders = Pair(prefill, decode, own), ORDERS if own else ORDERS[:1]
    out: dict[str, Any] = {"connector": arguments.connector, "extra": arguments.extra}

    def over(*_: object) -> None:
        raise TimeoutError(f"{arguments.limit} s are over")

    signal.signal(signal.SIGALRM, over)
    signal.alarm(int(arguments.limit))
    step = "start"

    def record(name: str, value: Any) -> None:
        out[name] = value
        print(name, json.dumps(value), file=sys.stderr, flush=True)

    try:
        begun = time.monotonic()
        prefill.start()
        decode.start()
        prefill.wait(deadline)
        plain.start()
        decode.wait(deadline)
        plain.wait(deadline)
        record("start_s", round(time.monotonic() - begun, 1))
        step = "first request"
        start = time.perf_counter()
        pair.ask({"prompt": prompt(100), "max_tokens": 2}, "prefill first")
        record("first_request_s", round(time.perf_counter() - start, 2))
        step = "correct"
        record("correct", _correct(pair, plain, orders, prompt, [one for one in LENGTHS if one < longest]))
        for length in [one for one in (1000, 8000) if one < longest]:
            step = f"ttft {length}"
            for engine in (prefill, decode, plain):
                engine.ask({"prompt": prompt(length), "max_tokens": 2})
            values: dict[str, Any] = {}
            for name, ask in (
                ("plain", lambda body: plain.ask(body, stream=True)),
                *((order, lambda body, order=order: pair.ask(body, order, True)) for order in orders),
                ("plain again", lambda body: plain.ask(body, stream=True)),
            ):
                values[name] = _ttft(ask, prompt, length, arguments.repeats)
            record(f"ttft_{length}", values)
        record("transfer_8000", _transfers(prefill, decode, 8000))
        record("transfer_1000", _transfers(prefill, decode, 1000))
        step = "burst"
        record("burst", {order: _burst(pair, prompt, order) for order in orders})
        if own:
            step = "prefill killed"
            running = pair.pool.submit(
                pair.ask, {"prompt": prompt(min(4000, longest // 2)), "max_tokens": 400}, "prefill first"
            )
            time.sleep(1)
            prefill.kill()
            body = {"prompt": prompt(161), "max_tokens": 8, "logprobs": 5, "kv_transfer_params":
                    {"transfer_id": "dead", "from": prefill.kv_address}}  # fmt: skip
            start = time.perf_counter()
            got, took = decode.ask(body), time.perf_counter() - start
            body.pop("kv_transfer_params")
            want = plain.ask(body)
            record("prefill_killed", {
                "seconds": round(took, 2), "text_equal": got["choices"][0]["text"] == want["choices"][0]["text"],
                "running_answered": len(running.result(60)["choices"]) == 1,
            })  # fmt: skip
        step = ""
    except Exception as error:
        record("error", f"{step}: {type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
        for engine in engines:
            engine.kill()
    print(json.dumps(out, indent=1))
    return 1 if "error" in out else 0


if __name__ == "__main__":
    raise SystemExit(main())
