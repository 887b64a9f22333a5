"""The command line; see the package."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_elastic import __doc__ as about_package
from bench.gpu_elastic.figures import table
from bench.gpu_elastic.run import ARMS, RAW, WRAP_UP, Run, Wanted
from bench.gpu_elastic.stack import ElasticStack
from bench.gpu_energy.sampler import ReadOnly
from bench.gpu_latency.processes import Machine
from disagg_power.devices import Devices, PowerError
from disagg_power.gpus import SIMULATED, open_devices
from disagg_power.nvml import NvmlDevices, load
from disagg_report.power import NoPower, PowerMeter
from disagg_report.records import Shot
from disagg_report.slo import Slo

RESULTS, TABLE = "results.jsonl", "table.md"
_KV_CACHE = {1: "20G", 2: "40G"}
"""Of each engine, by the number of GPUs: four engines on one GPU have half of it."""


class Results:
    """Findings, printed and appended to a file at once."""

    def __init__(self, out: Path) -> None:
        self._out, self._begun = out, time.monotonic()
        self.failed = False

    def __call__(self, step: str, **found: Any) -> None:
        self.failed |= step == "error"
        line = json.dumps({"t": round(time.monotonic() - self._begun, 1), "step": step, **found})
        print(line, flush=True)
        with (self._out / RESULTS).open("a", encoding="utf-8") as out:
            out.write(f"{line}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: measured as far as the time went; 1: an error ended it early; 2: usage."""
    arguments = _parser().parse_args(argv)
    out = Path(arguments.out)
    if arguments.report:
        print(write_table(out))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, RAW, TABLE):
        (out / name).unlink(missing_ok=True)
    results = Results(out)
    simulated = arguments.engines == "sim"
    found = ["sim"] if simulated else _gpus()
    gpus = (found[0], found[min(1, len(found) - 1)])
    notes = []
    if simulated:
        notes.append("SIMULATED engines: none of these figures is that of a GPU.")
    elif gpus[0] == gpus[1]:
        notes.append("REHEARSAL on one GPU that all four engines share: nothing here compares placements.")
    kv_cache = arguments.kv_cache or _KV_CACHE[len(set(gpus))]
    slo = Slo(arguments.slo_ttft_ms, arguments.slo_tpot_ms, 0.9)
    meter, no_power = _meter(gpus, simulated)
    results("about", engines=arguments.engines, gpus=list(gpus), slo=[slo.ttft_ms, slo.tpot_ms], notes=notes,
            kv_cache=None if simulated else kv_cache, limit_s=arguments.limit, no_power=no_power)  # fmt: skip
    run = Run(
        ElasticStack(_machine(arguments, out, kv_cache), gpus, (slo.ttft_ms, slo.tpot_ms)),
        Wanted(
            arguments.rates, arguments.rounds, arguments.tokens, arguments.answer, slo, arguments.lengths,
            arguments.singles, arguments.seed,
        ),
        time.monotonic() + arguments.limit, results, meter, lambda: (out / TABLE).write_text(table_of(out), "utf-8"),
    )  # fmt: skip
    asyncio.run(_bounded(run, arguments.limit, results))
    print(write_table(out))
    return 1 if results.failed else 0


async def _bounded(run: Run, limit: float, results: Results) -> None:
    """End the run in time, and on SIGTERM and SIGINT, with its processes."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(run.whole())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    _, pending = await asyncio.wait([task], timeout=max(0.1, limit - WRAP_UP / 2))
    if pending:
        task.cancel()
        await asyncio.wait([task])
    if task.cancelled():
        results("error", why="the limit was reached, or the run was ended by a signal")


def _machine(arguments: argparse.Namespace, out: Path, kv_cache: str) -> Machine:
    simulated = arguments.engines == "sim"
    own = () if simulated else ("--max-num-batched-tokens", "8192", "--kv-cache-memory-bytes", kv_cache)
    return Machine(
        model=arguments.model, connector="own", engines=arguments.engines, python=arguments.python, out=out,
        per_token=147_456 if simulated else 1, kv_buffer=0, memory=arguments.gpu_memory_utilization,
        dtype=arguments.dtype, arguments=(*own, *arguments.engine_argument),
        proxy_arguments=tuple(arguments.proxy_argument),
    )  # fmt: skip


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except OSError:
        raise SystemExit("gpu_elastic: there is no nvidia-smi; --engines sim rehearses without a GPU") from None
    if not said.split():
        raise SystemExit("gpu_elastic: nvidia-smi shows no GPU; --engines sim rehearses without one")
    return said.split()


def _meter(gpus: tuple[str, str], simulated: bool) -> tuple[PowerMeter | None, str]:
    """The meter of all GPUs used, or why there is none. It only reads."""
    if simulated and not os.environ.get(SIMULATED):
        return None, "simulated engines"
    try:
        devices: Devices = open_devices(os.environ) if os.environ.get(SIMULATED) else NvmlDevices(ReadOnly(load()))
        names = ["0"] if simulated else list(dict.fromkeys(gpus))
        return PowerMeter({name: [name] for name in names}, devices), ""
    except (NoPower, PowerError) as error:
        return None, str(error)


def write_table(out: Path) -> str:
    """Write table.md from the other files, and return it."""
    text = table_of(out)
    (out / TABLE).write_text(text, encoding="utf-8")
    return text


def table_of(out: Path) -> str:
    """The table of what results.jsonl and raw.jsonl have so far."""
    lines = list(_lines(out / RESULTS))
    about = next(line for line in lines if line["step"] == "about")
    requests = [
        (line, [Shot(**{**shot, "itl_ms": tuple(shot["itl_ms"])}) for shot in line["shots"]])
        for line in _lines(out / RAW)
    ]
    return table(lines, requests, Slo(*about["slo"], 0.9))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _whole(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_elastic", description=about_package,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", default="m", help="model folder; needed with vllm")
    add("--engines", choices=("vllm", "sim"), default="vllm")
    add("--out", default=os.environ.get("OUT", "gpu_elastic"), help="folder for results and logs")
    add("--limit", type=float, default=420, help="seconds for everything, start and end included")
    add("--report", action="store_true", help="make table.md again from the files in --out, and do nothing else")
    add("--rates", type=_numbers, default=[12.0, 24.0, 32.0, 40.0], help="requests/s, separated by commas")
    add("--rounds", type=int, default=3, help=f"of all rates on all arms ({', '.join(ARMS)})")
    add("--tokens", type=int, default=2000, help="tokens of a prompt")
    add("--answer", type=int, default=128, help="tokens of an answer")
    add("--slo-ttft-ms", type=float, default=400.0)
    add("--slo-tpot-ms", type=float, default=10.0)
    add("--lengths", type=_whole, default=[1000, 4000, 8000], help="tokens of the prompts of single requests")
    add("--singles", type=int, default=30, help="single requests of each length on each arm")
    add("--kv-cache", default="", help="KV cache of each engine (default: 40G, 20G where all share one GPU)")
    add("--gpu-memory-utilization", type=float, default=0.2, help="share of the GPU that vLLM wants free at its start")
    add("--dtype", default="bfloat16")
    add("--seed", type=int, default=11)
    add("--python", default=sys.executable, help="the interpreter that has vLLM")
    add("--engine-argument", action="append", default=[], help="one more argument of every engine")
    add("--proxy-argument", action="append", default=[], help="one more argument of both proxies")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
