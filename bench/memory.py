"""Whether the proxy's memory stays flat: many small requests, and many streams that stay open.

    python -m bench.memory                               both, as in docs/memory.md: about eight minutes
    python -m bench.memory --requests 10000 --streams 0

The proxy is a process of its own, started as users start it, and its memory is what the kernel says of it. Engines
(:mod:`bench.engine`) and clients run in this process. Prints a table, and writes everything as JSON with ``--json``.
Exit code 1 where a rule is broken:

1. Requests: memory is read ten times, each time at rest (nothing in flight, nothing in the background). A line fitted
   to the readings after the first fifth must rise by less than ``MOST_PER_REQUEST``.
2. Streams: the same number is opened twice. At the end of the first time memory may be no more than
   ``MOST_DRIFT`` of what the streams take above its beginning, and the second time must take no more than the first
   by the same measure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from bench.engine import Engine
from bench.load import Clients, Streams
from disagg_report.load_client import LoadClient

MOST_PER_REQUEST = 32.0
"""Bytes: less than any object that could be kept of one request, and 3 MiB for 100,000."""

MOST_DRIFT = 0.1

_READINGS = 10
_AT_ONCE = 48
_IDLE_SECONDS = 30.0
"""Seconds within which the proxy must become idle."""

_PAUSE = 1.0
"""Seconds between two tokens of an open stream."""

_LINE = re.compile(r"^(VmRSS|RssAnon|Threads):\s+(\d+)", re.MULTILINE)


class NotIdle(Exception):
    """The proxy did not become idle, or did not start."""


class Proxy:
    """``python -m disagg_proxy`` as a child process."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, zmq: str) -> None:
        self._process = process
        self._client = LoadClient(url)
        self.url = url
        self.zmq = zmq

    @classmethod
    async def start(cls) -> Proxy:
        """Start on ports that the kernel chooses, without a limit of requests per decode."""
        options = "--http-host 127.0.0.1 --http-port 0 --zmq-host 127.0.0.1 --zmq-port 0 --decode-max-in-flight 0"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "disagg_proxy", *options.split(), stderr=asyncio.subprocess.PIPE
        )
        url = zmq = ""
        assert process.stderr is not None
        while not (url and zmq):
            line = (await asyncio.wait_for(process.stderr.readline(), 20)).decode()
            if not line:
                raise NotIdle("the proxy ended at its start")
            url = url or next(iter(re.findall(r"Serving on (http://\S+)", line)), "")
            zmq = zmq or next(iter(re.findall(r"register on (\S+)", line)), "")
        proxy = cls(process, url, zmq)
        proxy._reading = asyncio.create_task(_swallow(process.stderr))
        return proxy

    async def stop(self) -> int:
        """Its exit code."""
        self._client.close()
        self._process.terminate()
        return await self._process.wait()

    def reading(self) -> dict[str, float]:
        """MiB resident, of these anonymous (heap), open files and threads."""
        found = dict(_LINE.findall(Path(f"/proc/{self._process.pid}/status").read_text()))
        files = len(os.listdir(f"/proc/{self._process.pid}/fd"))
        mib = {name: round(int(found[key]) / 1024, 2) for name, key in (("rss", "VmRSS"), ("heap", "RssAnon"))}
        return {**mib, "files": files, "threads": int(found["Threads"])}

    def cpu_seconds(self) -> float:
        """User and system time."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def stats(self) -> Any:
        """/stats."""
        return (await self._client.get("/stats")).json()

    async def until_idle(self) -> None:
        """Wait until no request is in flight and no background work runs."""
        end = time.monotonic() + _IDLE_SECONDS
        while time.monotonic() < end:
            requests = (await self.stats())["requests"]
            if not requests["in_flight"] and not requests["in_background"]:
                return
            await asyncio.sleep(0.1)
        raise NotIdle(f"still busy after {_IDLE_SECONDS:g} s: {requests}")

    async def ready(self) -> None:
        """Wait until there is a pair."""
        end = time.monotonic() + _IDLE_SECONDS
        while time.monotonic() < end:
            if (await self._client.get("/health")).status == 200:
                return
            await asyncio.sleep(0.1)
        raise NotIdle("no pair became ready")


async def _swallow(stream: asyncio.StreamReader) -> None:
    while await stream.readline():
        pass


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line with the least squares."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


async def many_requests(proxy: Proxy, count: int, seed: int) -> dict[str, Any]:
    """Rule 1."""
    clients = Clients(proxy.url, _AT_ONCE, seed)
    readings = [{"requests": 0, **proxy.reading()}]
    begun, cpu = time.monotonic(), proxy.cpu_seconds()
    show(readings[0])
    try:
        for number in range(1, _READINGS + 1):
            await clients.send(count // _READINGS)
            await proxy.until_idle()
            readings.append({"requests": number * (count // _READINGS), **proxy.reading()})
            show(readings[-1])
    finally:
        clients.close()
    late = [(r["requests"], r["heap"] * 2**20) for r in readings if r["requests"] >= count / 5]
    rise = slope(late)
    return {
        "readings": readings,
        "seconds": round(time.monotonic() - begun, 1),
        "proxy_cpu_seconds": round(proxy.cpu_seconds() - cpu, 1),
        "outcomes": dict(clients.outcomes.most_common()),
        "bytes_per_request": round(rise, 2),
        "flat": rise < MOST_PER_REQUEST,
    }


async def open_streams(proxy: Proxy, count: int, seconds: float) -> dict[str, Any]:
    """Rule 2: for ``seconds``, and once more for a sixth of that."""
    readings = [{"moment": "before", **proxy.reading()}]
    show(readings[0])
    peaks, tokens = [], 0
    for round_, lasting in enumerate((seconds, seconds / 6), 1):
        streams = Streams(proxy.url, count, _PAUSE)
        try:
            await streams.start()
            begun = time.monotonic()
            for part in range(1, 7):
                await asyncio.sleep(max(0.0, begun + lasting * part / 6 - time.monotonic()))
                moment = f"{lasting * part / 6:.0f} s open, round {round_}"
                readings.append({"moment": moment, "open": streams.open, **proxy.reading()})
                show(readings[-1])
            if streams.failed:
                raise NotIdle(f"{streams.failed} streams ended by themselves")
            tokens += streams.tokens
        finally:
            await streams.stop()
        peaks.append(readings[-1]["heap"])
        await proxy.until_idle()
        readings.append({"moment": f"closed, round {round_}", **proxy.reading()})
        show(readings[-1])
    before = readings[0]["heap"]
    during = [r["heap"] for r in readings if "round 1" in r["moment"] and "open" in r]
    taken = peaks[0] - before
    return {
        "readings": readings,
        "streams": count,
        "tokens": tokens,
        "kib_per_stream": round(taken * 1024 / count, 1),
        "flat": during[-1] - during[0] < MOST_DRIFT * taken and peaks[1] - peaks[0] < MOST_DRIFT * taken,
    }


def show(reading: dict[str, Any]) -> None:
    """One line of the table."""
    label = f"{reading['requests']:,} requests" if "requests" in reading else reading["moment"]
    print(
        f"{label:>24}  RSS {reading['rss']:7.1f} MiB  heap {reading['heap']:7.1f} MiB  {reading['files']:5} files",
        flush=True,
    )


async def run(requests: int, streams: int, seconds: float, seed: int) -> dict[str, Any]:
    """Run each measurement on a new proxy."""
    result: dict[str, Any] = {"python": platform.python_version(), "cpus": os.cpu_count(), "seed": seed}
    for name, wanted in (("requests", requests), ("streams", streams)):
        if not wanted:
            continue
        proxy = await Proxy.start()
        engines = [Engine("P"), Engine("D")]
        try:
            for engine in engines:
                await engine.start(proxy.zmq)
            await proxy.ready()
            if name == "requests":
                result[name] = await many_requests(proxy, wanted, seed)
            else:
                result[name] = await open_streams(proxy, wanted, seconds)
            stats = await proxy.stats()
            result[name]["stats"] = {key: stats[key] for key in ("requests", "kv_releases")}
        finally:
            for engine in engines:
                await engine.stop()
            result.setdefault(name, {})["exit_code"] = await proxy.stop()
    return result


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="Whether the proxy's memory stays flat")
    parser.add_argument("--requests", type=int, default=100_000, help="small requests; 0 for none (100000)")
    parser.add_argument("--streams", type=int, default=1000, help="open at once; 0 for none (1000)")
    parser.add_argument("--seconds", type=float, default=180.0, help="that they stay open (180)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    uvloop.install()
    result = asyncio.run(run(options.requests, options.streams, options.seconds, options.seed))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    parts = [part for part in (result.get("requests"), result.get("streams")) if part]
    for part in parts:
        print(json.dumps({key: value for key, value in part.items() if key != "readings"}))
    return 0 if all(part["flat"] and part["exit_code"] == 0 for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
