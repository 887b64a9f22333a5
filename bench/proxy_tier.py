"""What a tier of proxies gives, and what each engine costs it.

    python -m bench.proxy_tier --short           about two minutes
    python -m bench.proxy_tier --json tier.json  1, 2 and 4 proxies, 2 to 16 engines, three rounds

Three measurements, whose figures docs/proxy-tier.md extends to 1,000 engines:

throughput  requests per second and the proxies' CPU time for each, with stand-ins for engines (:mod:`bench.engine`).
            The load is divided equally among the proxies. Pinned as in :mod:`bench.workers` where there are enough
            cores; else proxies, engines and load compete, and only CPU time for each request is comparable.
idle        CPU time and network traffic of proxies over simulated engines (`disagg_sim`, connector `disagg_kv`) that
            have nothing to do: pings, probes, idle connections. Traffic is that of the loopback interface of a network
            namespace of its own, so it is exact, headers included, and missing where none can be made. The cost of one
            engine is the difference between many and few of them.
choice      CPU time of choosing a pair among so many engines, and of listing the candidates anew after a change.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import random
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from bench.engine import Engine
from bench.observe import microseconds
from bench.workers import cores_for, cpu_seconds, helper, proxy_processes, send_load, until_pairs
from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.policies import DECODE_POLICIES, PREFILL_POLICIES, Traits
from disagg_proxy.cluster.policies.table import PrefixTable
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.selection import Selection
from disagg_proxy.connectors import disagg_kv
from disagg_proxy.openai.prefix_hash import ENDS
from disagg_sim import SimConfig, SimEngine

_ENGINES_OF_PROCESS = 4
_ROUNDS = 5
_INSIDE = "BENCH_PROXY_TIER_NAMESPACE"

_ANNOUNCEMENT = {
    "protocol": "disagg_kv", "protocol_version": 1, "tp": 1, "layout": "(2,B*16,8,128)", "dtype": "bfloat16",
    "block_size": 16, "block_bytes": 65536, "kv_model": "Qwen3-4B", "kv_digest": "0" * 32, "kv_secret": "0" * 8,
    "transports": ["nccl", "ipc", "tcp"], "boot_id": "",
}  # fmt: skip
"""What an engine announces of its cache."""


# -- the other processes


async def _engines(kind: str, count: int, proxies: Sequence[str]) -> None:
    """Engines until this process is ended; half of them prefill."""
    if kind == "stand-in":
        for number in range(count):
            await Engine("PD"[number % 2]).start(*proxies)
    else:
        for number in range(count):
            role = ("prefill", "decode")[number % 2]
            config = SimConfig(role=role, connector="disagg_kv", proxy=",".join(proxies), record_requests=False)
            await SimEngine(config).start()
    print("started", flush=True)
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def _tier(
    kind: str, proxies: int, engines: int, cores: tuple[set[int], set[int]] | None
) -> AsyncIterator[tuple[list[str], list[int]]]:
    """Proxies that have every pair; yields their addresses and process ids."""
    ours, theirs = cores if cores else (None, None)
    async with contextlib.AsyncExitStack() as stack:
        started = [await stack.enter_async_context(proxy_processes(1, ours)) for _ in range(proxies)]
        registration = [zmq for _, zmq, _ in started]
        left = engines
        while left:
            count = min(left, _ENGINES_OF_PROCESS)
            child = await helper(theirs, "--engines", kind, str(count), *registration, module="bench.proxy_tier")
            stack.push_async_callback(_end, child)
            assert child.stdout is not None
            await asyncio.wait_for(child.stdout.readline(), 30)
            left -= count
        for address, _, _ in started:
            await asyncio.wait_for(until_pairs(address, (engines // 2) ** 2), 60)
        yield [address for address, _, _ in started], [pid for _, _, pids in started for pid in pids]


async def _end(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    await child.wait()


# -- throughput


async def throughput(proxies: int, engines: int, requests: int, connections: int) -> dict[str, Any]:
    """One round of load."""
    cores = cores_for(proxies, sorted(os.sched_getaffinity(0)))
    theirs = cores[1] if cores else None
    async with _tier("stand-in", proxies, engines, cores) as (addresses, pids):
        share, connected = requests // proxies, max(1, connections // proxies)
        await asyncio.gather(*(send_load(theirs, one, max(100, share // 10), connected, 1) for one in addresses))
        before = cpu_seconds(pids)
        loads = await asyncio.gather(*(send_load(theirs, one, share, connected, 1) for one in addresses))
        cpu = cpu_seconds(pids) - before
    results = [result for load in loads for result in load]
    right = sum(result["right"] for result in results)
    return {
        "proxies": proxies,
        "engines": engines,
        "pinned": cores is not None,
        "requests": right,
        "failed": sum(result["wrong"] for result in results),
        "requests_per_second": sum(result["right"] / result["seconds"] for result in results),
        "cpu_us_per_request": cpu / right * 1e6,
    }


# -- idle


def traffic() -> tuple[int, int] | None:
    """Bytes and packets of the loopback interface so far; None outside a namespace of its own."""
    if os.environ.get(_INSIDE) != "1":
        return None
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "lo":
            fields = rest.split()
            return int(fields[0]), int(fields[1])
    return None


def exact_cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of all threads, in nanoseconds where /proc/PID/stat has ticks."""
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


async def idle(proxies: int, engines: int, seconds: float) -> dict[str, Any]:
    """CPU time and traffic while nothing is requested."""
    async with _tier("simulated", proxies, engines, None) as (_, pids):
        # Introductions and the first probes are over.
        await asyncio.sleep(min(10.0, seconds / 2))
        begun, cpu, sent = time.monotonic(), exact_cpu_seconds(pids), traffic()
        await asyncio.sleep(seconds)
        took, cpu, now = time.monotonic() - begun, exact_cpu_seconds(pids) - cpu, traffic()
    found = {"proxies": proxies, "engines": engines, "cpu_ms_per_second": cpu / took * 1e3 / proxies}
    if sent is not None and now is not None:
        found["bytes_per_second"] = (now[0] - sent[0]) / took / proxies
        found["packets_per_second"] = (now[1] - sent[1]) / took / proxies
    return found


# -- the choice of a pair


def choice(engines: int) -> dict[str, Any]:
    """CPU time of the proxy's own selection with the default policies, half of the engines prefill."""
    registry = Registry(time.monotonic, expiry=1e9)
    for number in range(engines):
        role, host = (Role.PREFILL, Role.DECODE)[number % 2], f"10.{number >> 8}.{number & 255}.1"
        announced = disagg_kv.read({**_ANNOUNCEMENT, "zmq_address": f"{host}:21001"})
        assert announced is not None
        registry.announce(role, parse_address(f"{host}:8000"), announced.kv, announced.kind)
    instances = list(registry.instances())
    for instance in instances:
        registry.admit(instance, {"m": {}})
    selection = Selection(
        registry, PREFILL_POLICIES["prefix_aware"], DECODE_POLICIES["joint"], table=PrefixTable(ENDS),
        random=random.Random(1).random,
    )  # fmt: skip
    traits = Traits(tokens=512)

    def changed() -> None:
        registry.admit(instances[0], {"m": {}, f"adapter-{next(adapters)}": {}})
        selection.choose("m", traits=traits)

    adapters = iter(range(10**9))
    selection.choose("m", traits=traits)
    found = microseconds(lambda: selection.choose("m", traits=traits), max(20, 20_000 // engines), _ROUNDS)
    after = microseconds(changed, 1 if engines > 100 else 20, _ROUNDS)
    return {"engines": engines, "choose_us": found, "after_a_change_us": after}


# -- all of it


def table(found: dict[str, Any]) -> str:
    """Medians of the rounds as text."""
    lines = ["proxies  engines  requests/s  CPU us/request"]
    cells = {(one["proxies"], one["engines"]) for one in found["throughput"]}
    for proxies, engines in sorted(cells):
        mine = [one for one in found["throughput"] if (one["proxies"], one["engines"]) == (proxies, engines)]
        rate, cpu = (
            statistics.median(one[name] for one in mine) for name in ("requests_per_second", "cpu_us_per_request")
        )
        lines.append(f"{proxies:<8} {engines:<8} {rate:<11.0f} {cpu:.0f}")
    if not all(one["pinned"] for one in found["throughput"]):
        lines.append("not pinned: too few cores; requests/s is that of proxies, engines and load together")
    lines += ["", "idle: each proxy, each second", "proxies  engines  CPU ms  bytes     packets"]
    for one in found["idle"]:
        bytes_, packets = (one.get(name) for name in ("bytes_per_second", "packets_per_second"))
        shown = "not measured" if bytes_ is None or packets is None else f"{bytes_:<9.0f} {packets:.0f}"
        lines.append(f"{one['proxies']:<8} {one['engines']:<8} {one['cpu_ms_per_second']:<7.2f} {shown}")
    for name, value in found["each_engine"].items():
        lines.append(f"one more engine: {value:.3f} {name} in each proxy")
    lines += ["", "choice: engines  CPU us  after a change"]
    lines += [
        f"        {one['engines']:<8} {one['choose_us']:<7.1f} {one['after_a_change_us']:.0f}"
        for one in found["choice"]
    ]
    return "\n".join(lines)


def each_engine(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What one more engine costs each proxy a second: from the fewest to the most engines, mean over the tiers."""
    found: dict[str, float] = {}
    for name in ("cpu_ms_per_second", "bytes_per_second", "packets_per_second"):
        slopes = []
        for proxies in sorted({row["proxies"] for row in rows}):
            mine = sorted((row for row in rows if row["proxies"] == proxies), key=lambda row: int(row["engines"]))
            few, many = mine[0], mine[-1]
            if name in few and many["engines"] > few["engines"]:
                slopes.append((many[name] - few[name]) / (many["engines"] - few["engines"]))
        if slopes:
            found[name] = statistics.mean(slopes)
    return found


async def run(given: argparse.Namespace) -> dict[str, Any]:
    """Everything, one after the other; rounds of throughput alternate."""
    cells = [(proxies, engines) for proxies in given.proxies for engines in given.engine_counts]
    found: dict[str, Any] = {"throughput": [], "idle": []}
    found["choice"] = [choice(engines) for engines in given.choices]
    for proxies in sorted({min(given.proxies), max(given.proxies)}):
        for engines in sorted({min(given.engine_counts), max(given.engine_counts)}):
            found["idle"].append(await idle(proxies, engines, given.idle))
            print(json.dumps(found["idle"][-1]), file=sys.stderr)
    for number in range(given.rounds):
        for proxies, engines in cells if number % 2 == 0 else reversed(cells):
            found["throughput"].append(await throughput(proxies, engines, given.requests, given.connections))
            print(json.dumps(found["throughput"][-1]), file=sys.stderr)
    found["each_engine"] = each_engine(found["idle"])
    return found


def _into_namespace(argv: Sequence[str]) -> int | None:
    """Run again in a network namespace, where the loopback interface has this benchmark's traffic alone. None where
    that is not possible, or done."""
    if os.environ.get(_INSIDE) or shutil.which("unshare") is None:
        return None
    unshare = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        print("no network namespaces here: traffic is not measured", file=sys.stderr)
        return None
    command = [*unshare, sys.executable, "-m", "bench.proxy_tier", *argv]
    return subprocess.run(command, env={**os.environ, _INSIDE: "1"}).returncode


def _loopback_up() -> None:
    siocgifflags, siocsifflags, up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        request = fcntl.ioctl(one, siocgifflags, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack("16sh14x", request)[1] | up
        fcntl.ioctl(one, siocsifflags, struct.pack("16sh14x", b"lo", flags))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit code 1 when a request failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.proxy_tier", description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="one round, fewer cells, shorter")
    parser.add_argument("--proxies", type=int, nargs="+", default=[1, 2, 4], help="sizes of the tier")
    parser.add_argument("--engine-counts", type=int, nargs="+", default=[2, 4, 8, 16], help="even numbers of engines")
    parser.add_argument("--choices", type=int, nargs="+", default=[2, 16, 128, 1000], help="engines to choose among")
    parser.add_argument("--requests", type=int, default=6000, help="of each round, in all")
    parser.add_argument("--connections", type=int, default=64, help="in all")
    parser.add_argument("--rounds", type=int, default=3, help="of throughput")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds of each idle measurement")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--engines", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.engines:
        kind, count, *proxies = given.engines
        uvloop.install()
        asyncio.run(_engines(kind, int(count), proxies))
        return 0
    if any(count < 2 or count % 2 for count in given.engine_counts):
        parser.error("--engine-counts must be even, and at least 2")
    if (code := _into_namespace(argv)) is not None:
        return code
    if os.environ.get(_INSIDE) == "1":
        _loopback_up()
    uvloop.install()
    if given.short:
        given.engine_counts, given.requests, given.rounds, given.idle = [2, 16], 2000, 1, 8.0
    found = asyncio.run(run(given))
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    return 1 if any(one["failed"] for one in found["throughput"]) else 0


if __name__ == "__main__":
    sys.exit(main())
