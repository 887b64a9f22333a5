"""Real prefill and decode on one GPU by CUDA IPC: are answers right, where does TTFT go, what do kills do?

How to run, on a machine with one GPU (or two) and vLLM, from the root of this checkout:

    python3 -m bench.gpu_shared --model /tmp/model --out "$OUT" [--limit 540] [--eager] [--only PHASES]

One process drives all of it and ends by itself after --limit seconds, engines included. At first it kills a process
whose memory another one has mapped, without any engine (about 30 s). Then it starts five engines of about 20 GB each at
the same time: plain, prefill, decode behind the proxy, a second decode by IPC, a third by TCP; five took 112-163 s on
one H200. Every finding is a line of JSON, printed and appended to OUT/results.jsonl as it comes; logs and traces of the
engines stay in OUT.

Phases: mapping (CUDA alone), answers, first_tokens, transfers, memory, decode_killed,
prefill_killed, prefill_back. With two GPUs prefill and plain are on the first one and the decodes on the second, so
that ``proxy`` is NCCL and ``direct`` IPC. Needs aiohttp, and what the proxy needs (requirements-proxy.txt).

Rehearsal without a GPU, the flow only: python -m bench.gpu_shared --engines sim --out /tmp/rehearsal --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp

from bench.gpu_shared import mapping, phases
from bench.gpu_shared.engines import Client, Engine, Options, Process, free_port, proxy_process
from bench.gpu_shared.phases import Bench

PHASES: dict[str, Callable[[Bench], AsyncIterator[dict[str, Any]]]] = {
    "answers": phases.answers,
    "first_tokens": phases.first_tokens,
    "transfers": phases.transfers,
    "memory": phases.memory,
    "decode_killed": phases.decode_killed,
    "prefill_killed": phases.prefill_killed,
    "prefill_back": phases.prefill_back,
}
_LEAST_SECONDS = 25.0
"""A phase does not begin with less time left."""
_MAPPING_SECONDS = 70.0


class Results:
    """Findings, printed and written at once."""

    def __init__(self, out: Path) -> None:
        self._file, self._start = out / "results.jsonl", time.monotonic()

    def __call__(self, phase: str, **found: Any) -> None:
        line = json.dumps({"t": round(time.monotonic() - self._start, 1), "phase": phase, **found}, default=str)
        print(line, flush=True)
        with self._file.open("a") as out:
            out.write(line + "\n")


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    try:
        said = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=30, check=False).stdout  # fmt: skip
    except OSError:
        return ["0"]
    return said.split() or ["0"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_shared", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="/tmp/model", help="folder of the model")
    parser.add_argument("--out", default=os.environ.get("OUT", "gpu_shared"), help="folder for results and logs")
    parser.add_argument("--limit", type=float, default=540, help="seconds for all of it")
    parser.add_argument("--engines", choices=("vllm", "sim"), default="vllm")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: starts faster")
    parser.add_argument("--rounds", type=int, default=30, help="requests of each length on each way")
    parser.add_argument("--kv-cache", default="10G", help="KV cache of each engine")
    parser.add_argument("--utilization", default="0.2", help="what vLLM wants free at its start")
    parser.add_argument("--only", default="", help="phases, separated by commas")
    parser.add_argument("--engine-argument", action="append", default=[], help="one more for every engine")
    return parser.parse_args()


async def _mapping(results: Results, gpus: list[str], out: Path) -> None:
    def run() -> None:
        for found in mapping.run((gpus[0], gpus[-1]), out, _MAPPING_SECONDS):
            results("mapping", **found)

    try:
        await asyncio.to_thread(run)
    except Exception as error:
        results("mapping", error=f"{type(error).__name__}: {error}")


async def _start(bench: Bench, results: Results, proxy: Process) -> bool:
    """Start everything at the same time; whether all of it is ready."""
    engines = (bench.prefill, *bench.decodes, bench.plain)
    proxy.start()
    for engine in engines:
        engine.process.start()

    async def wait(engine: Engine) -> bool:
        ready = await bench.client.ready(engine.port, bench.deadline - 60, engine.process)
        results("start", engine=engine.name, ready=ready)
        return ready

    ready = await asyncio.gather(*(wait(engine) for engine in engines))
    pair = await bench.client.ready(bench.proxy_port, min(bench.deadline, time.monotonic() + 20), proxy)
    for _ in range(40):
        if (await bench.client.get(bench.proxy_port, "/health")).get("pairs"):
            break
        await asyncio.sleep(0.5)
    results("start", proxy=pair)
    return all(ready)


async def _run(arguments: argparse.Namespace, results: Results, processes: list[Process]) -> None:
    out, gpus = Path(arguments.out), _gpus()
    simulated = arguments.engines == "sim"
    options = Options(arguments.model, out, simulated, arguments.eager, arguments.kv_cache, arguments.utilization,
                      tuple(arguments.engine_argument))  # fmt: skip
    port, registration = free_port(), free_port()
    first, last = gpus[0], gpus[1] if len(gpus) > 1 else gpus[0]
    results("machine", gpus=gpus, python=sys.version.split()[0], limit=arguments.limit)
    timeout = aiohttp.ClientTimeout(120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        bench = Bench(
            Client(http), port,
            Engine("prefill", "prefill", first, options, proxy=registration),
            Engine("decode", "decode", last, options, proxy=registration),
            Engine("decode-ipc", "decode", last, options, transport="ipc"),
            Engine("decode-tcp", "decode", last, options, transport="tcp"),
            Engine("plain", "plain", first, options),
            rounds=arguments.rounds, deadline=time.monotonic() + arguments.limit - 15,
        )  # fmt: skip
        proxy = proxy_process(options, port, registration)
        processes += [proxy, *(one.process for one in (bench.prefill, *bench.decodes, bench.plain))]
        wanted = arguments.only.split(",") if arguments.only else ["mapping", *PHASES]
        if "mapping" in wanted and not simulated:
            await _mapping(results, gpus, out)
        if any(name in PHASES for name in wanted) and await _start(bench, results, proxy):
            for name in (name for name in PHASES if name in wanted):
                if bench.left < _LEAST_SECONDS:
                    results(name, skipped=f"{bench.left:.0f} s left")
                    continue
                try:
                    async for found in PHASES[name](bench):
                        results(name, **found)
                except Exception as error:
                    results(name, error=f"{type(error).__name__}: {error}", at=traceback.format_exc()[-600:])


def main() -> int:
    arguments = _arguments()
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    results, processes = Results(Path(arguments.out)), list[Process]()
    try:
        asyncio.run(asyncio.wait_for(_run(arguments, results, processes), arguments.limit))
        return 0
    except TimeoutError:
        results("end", error="the time is over")
        return 1
    finally:
        for process in processes:
            process.kill()
        results("end")


if __name__ == "__main__":
    sys.exit(main())
