"""Scaling with workers: requests per second, and CPU time per request.

    python -m bench.workers                          one and two workers, on what cores there are
    python -m bench.workers --workers 1 2 4 8        where there are more
    python -m bench.workers --requests 20000 --rounds 5 --json workers.json

The proxy is started as users start it; engines (:mod:`bench.engine`) and load are separate processes. Rounds alternate
between the numbers of workers. With at least two cores more than workers everything is pinned: the proxy to as many
cores as it has workers, engines and load to the others; only then do requests per second show how the proxy scales.
With fewer cores they compete, and only the proxy's CPU time per request, including the supervisor's, is comparable.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from bench.engine import MODEL, Engine
from disagg_report.load_client import LoadClient, Response

_TICKS = os.sysconf("SC_CLK_TCK")
_PAIRS = 2
_BODY = json.dumps({"model": MODEL, "prompt": "San Francisco is a", "max_tokens": 8}).encode()


# -- the other processes


async def _send(url: str, requests: int, connections: int) -> None:
    client, left = LoadClient(url), iter(range(requests))
    answers: Counter[bool] = Counter()

    async def work() -> None:
        for _ in left:
            answers[(await client.post("/v1/completions", _BODY, Response())).status == 200] += 1

    begun = time.monotonic()
    await asyncio.gather(*(work() for _ in range(connections)))
    seconds = time.monotonic() - begun
    client.close()
    print(json.dumps({"right": answers[True], "wrong": answers[False], "seconds": seconds}))


async def _engines(zmq: str) -> None:
    engines = [Engine(role) for _ in range(_PAIRS) for role in "PD"]
    for engine in engines:
        await engine.start(zmq)
    await asyncio.get_running_loop().connect_read_pipe(asyncio.Protocol, sys.stdin)
    await asyncio.Event().wait()


# -- the measurement


class NoStart(Exception):
    """The proxy did not start."""


def cores_for(workers: int, cores: Sequence[int]) -> tuple[set[int], set[int]] | None:
    """Cores of the proxy, and cores of engines and load; None if there are too few to separate them."""
    if len(cores) < workers + 2:
        return None
    return set(cores[:workers]), set(cores[workers:])


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU seconds that the processes have used so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


@contextlib.asynccontextmanager
async def proxy_processes(workers: int, cores: set[int] | None) -> AsyncIterator[tuple[str, str, list[int]]]:
    """Yields host:port for clients, host:port for engines, and the process ids."""
    options = "--http-host 127.0.0.1 --http-port 0 --zmq-host 127.0.0.1 --zmq-port 0 --decode-max-in-flight 0"
    pin = ["taskset", "-c", ",".join(map(str, sorted(cores)))] if cores else []
    process = await asyncio.create_subprocess_exec(
        *pin, sys.executable, "-m", "disagg_proxy", *options.split(), "--workers", str(workers),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        output = ""
        while not (found := re.search(r"Serving on http://(\S+:\d+).*may register on (\S+:\d+)", output, re.S)):
            line = await asyncio.wait_for(process.stderr.readline(), 30)
            if not line:
                raise NoStart(output)
            output += line.decode()
        unread = asyncio.create_task(process.stderr.read())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield found[1].split()[0], found[2], [process.pid, *map(int, children)]
        process.terminate()
        await unread
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        await process.wait()


async def helper(cores: set[int] | None, *args: str, module: str = "bench.workers") -> asyncio.subprocess.Process:
    """Start ``python -m module args``."""
    pin = ["taskset", "-c", ",".join(map(str, sorted(cores)))] if cores else []
    return await asyncio.create_subprocess_exec(
        *pin, sys.executable, "-m", module, *args,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def until_pairs(address: str, pairs: int) -> None:
    """Wait until a proxy has so many pairs."""
    # A new connection each time, so that every worker gets some of them.
    client = LoadClient(f"http://{address}", reuse=False)
    while (await client.get("/health")).json().get("pairs") != pairs:
        await asyncio.sleep(0.1)


async def measure(workers: int, requests: int, connections: int, loads: int) -> dict[str, Any]:
    """Measure one round with ``workers`` workers."""
    split = cores_for(workers, sorted(os.sched_getaffinity(0)))
    ours, theirs = split if split else (None, None)
    async with proxy_processes(workers, ours) as (address, zmq, pids):
        engines = await helper(theirs, "--engines", zmq)
        try:
            # Every worker answers some of these.
            for _ in range(4 * workers):
                await asyncio.wait_for(until_pairs(address, _PAIRS * _PAIRS), 30)
            await send_load(theirs, address, max(200, requests // 10), connections, loads)
            before, begun = cpu_seconds(pids), time.monotonic()
            results = await send_load(theirs, address, requests, connections, loads)
            seconds, cpu = time.monotonic() - begun, cpu_seconds(pids) - before
            each = [cpu_seconds([pid]) for pid in pids]
        finally:
            engines.terminate()
            await engines.wait()
    right = sum(result["right"] for result in results)
    return {
        "workers": workers,
        "pinned": split is not None,
        "requests": right,
        "failed": sum(result["wrong"] for result in results),
        "requests_per_second": right / max(result["seconds"] for result in results),
        "cpu_us_per_request": cpu / right * 1e6,
        "cores_used": cpu / seconds,
        "cpu_seconds_of_each_process": each,
    }


async def send_load(
    cores: set[int] | None, address: str, requests: int, connections: int, loads: int
) -> list[dict[str, float]]:
    """Send requests from ``loads`` processes; what each of them reports."""
    share = [str(requests // loads), str(connections // loads)]
    processes = [await helper(cores, "--load", address, *share) for _ in range(loads)]
    outputs = await asyncio.gather(*(process.communicate() for process in processes))
    return [json.loads(out) for out, _ in outputs]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Medians, with minimum and maximum of all rounds."""
    lines = ["workers  requests/s            CPU us/request        cores used"]
    for workers in sorted({result["workers"] for result in results}):
        mine = [result for result in results if result["workers"] == workers]
        cells = []
        for name in ("requests_per_second", "cpu_us_per_request", "cores_used"):
            values = [result[name] for result in mine]
            digits = 2 if name == "cores_used" else 0
            low, mid, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
            cells.append(f"{mid} ({low}-{high})")
        lines.append(f"{workers:<8} " + "".join(f"{cell:<22}" for cell in cells).rstrip())
    if not all(result["pinned"] for result in results):
        lines.append("not pinned: too few cores; requests/s is that of proxy, engines and load together")
    return "\n".join(lines)


async def run(counts: Sequence[int], requests: int, connections: int, rounds: int, loads: int) -> dict[str, Any]:
    """Run all rounds alternately."""
    results = []
    for number in range(rounds):
        for workers in counts if number % 2 == 0 else reversed(counts):
            results.append(await measure(workers, requests, connections, loads))
            print(json.dumps({k: v for k, v in results[-1].items() if not isinstance(v, list)}), file=sys.stderr)
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "kernel": platform.release()}
    return {"machine": machine, "rounds": results}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit code 1 when a request failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.workers", description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to compare")
    parser.add_argument("--requests", type=int, default=6000, help="of each round")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--loads", type=int, default=1, help="processes that send requests")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--engines", help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    uvloop.install()
    if given.engines:
        asyncio.run(_engines(given.engines))
        return 0
    if given.load:
        asyncio.run(_send(f"http://{given.load[0]}", int(given.load[1]), int(given.load[2])))
        return 0
    result = asyncio.run(run(given.workers, given.requests, given.connections, given.rounds, given.loads))
    print(table(result["rounds"]))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
    return 1 if any(one["failed"] for one in result["rounds"]) else 0


if __name__ == "__main__":
    sys.exit(main())
