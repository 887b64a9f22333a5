"""Engines, a started proxy, and one measurement of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import zmq

from bench.proxy import machine
from bench.proxy.machine import Cores
from bench.proxy.peers import Peer
from bench.proxy.slices import Slice, clean, figures
from bench.proxy.workloads import Workload

_READY = 40.0
"""Seconds for a proxy to start and find its engines."""

_MARGIN = 0.25
"""Seconds by which slices may begin late, so that the last one is whole."""

_PING = 3.0
"""As vLLM's connector does (0.9.2 - 0.23, ``kv_connector/v1/p2p/p2p_nccl_engine.py``)."""

_KV = {"P": "127.0.0.1:25001", "D": "127.0.0.1:25002"}


class Failed(Exception):
    """A proxy did not start, or did not answer as it must."""


@dataclass
class Bench:
    """The fixed part of all measurements: programs, cores and the engines."""

    cores: Cores
    load: Path
    prefill: int
    decode: int
    engine_pid: int
    logs: Path

    def tell_engines(self, **settings: int) -> None:
        """See engine.c, /set."""
        query = "&".join(f"{name}={value}" for name, value in settings.items())
        _get(f"http://127.0.0.1:{self.prefill}/set?{query}")

    def served(self) -> tuple[int, int]:
        """Requests that prefill and decode have had so far."""
        count = json.loads(_get(f"http://127.0.0.1:{self.prefill}/count"))
        return count["prefill"], count["decode"]


@dataclass
class Started:
    """A proxy that serves; ``port`` is decode's own where there is no proxy."""

    peer: Peer
    port: int
    pids: list[int] = field(default_factory=list)
    idle_kb: int = 0


def _get(url: str, body: bytes | None = None, patience: float = 5.0) -> bytes:
    asked = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=patience) as answer:
        return bytes(answer.read())


@contextlib.contextmanager
def bench(cores: Cores, cache: Path) -> Iterator[Bench]:
    """Build the programs and start the engines."""
    machine.allow_files()
    engine, load = machine.build("engine", cache), machine.build("load", cache)
    logs = cache / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with machine.running([str(engine)], cores.load, log=subprocess.PIPE) as process:
        assert process.stdout is not None
        ports = process.stdout.readline().split()
        if len(ports) != 2:
            raise Failed("the engines do not start")
        yield Bench(cores, load, int(ports[0]), int(ports[1]), process.pid, logs)


@contextlib.contextmanager
def _pings(bench: Bench, zmq_port: int) -> Iterator[None]:
    """Announce both engines to a proxy, again and again."""
    over = threading.Event()
    http = {"P": bench.prefill, "D": bench.decode}

    def ping() -> None:
        context = zmq.Context()
        sockets = []
        for role, kv in _KV.items():
            dealer = context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt_string(zmq.IDENTITY, kv)
            dealer.connect(f"tcp://127.0.0.1:{zmq_port}")
            text = {"type": role, "http_address": f"127.0.0.1:{http[role]}", "zmq_address": kv}
            sockets.append((dealer, msgpack.packb(text)))
        while True:
            for dealer, message in sockets:
                with contextlib.suppress(zmq.Again):
                    dealer.send(message, zmq.NOBLOCK)
            if over.wait(_PING):
                break
        for dealer, _ in sockets:
            dealer.close()
        context.term()

    thread = threading.Thread(target=ping, name="pings")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def started(bench: Bench, peer: Peer, programs: Path) -> Iterator[Started]:
    """Start a proxy, let it find the engines, and see that it does its job.

    Raises:
        Failed: it does not.
    """
    if peer.command is None:
        yield Started(peer, bench.decode)
        return
    place = peer.place(bench.prefill, bench.decode, programs)
    path = bench.logs / f"{peer.name}.log"
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(path.open("w"))
        if peer.pings:
            stack.enter_context(_pings(bench, place.zmq))
        process = stack.enter_context(
            machine.running(peer.command(place), bench.cores.proxy, log=log, environment=peer.environment)
        )
        bench.tell_engines(prefill_one=int(peer.prefill_one), gap_us=0, lockstep=0)
        _wait_ready(process, place.http, path)
        before = bench.served()
        _ask(place.http)
        after = bench.served()
        if (after[0] - before[0], after[1] - before[1]) != (1, 1):
            raise Failed(f"one request became {after[0] - before[0]} on prefill, {after[1] - before[1]} on decode")
        pids = machine.tree(process.pid)
        idle = Started(peer, place.http, pids, machine.rss_kb(pids))
        yield idle


def _ask(port: int) -> None:
    """One small stream.

    Raises:
        Failed: the answer is not what the engine said.
    """
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps({"model": "bench-model", "prompt": "hi", "max_tokens": 3, **options}).encode()
    answer = _get(f"http://127.0.0.1:{port}/v1/completions", body)
    if [answer.count(f"tok000{i}".encode()) for i in range(4)] != [1, 1, 1, 0] or b"[DONE]" not in answer:
        raise Failed(f"a wrong answer: {answer[:200]!r}")


def _wait_ready(process: subprocess.Popen[str], port: int, log: Path) -> None:
    end = time.monotonic() + _READY
    while True:
        try:
            return _ask(port)
        except (OSError, urllib.error.URLError, Failed) as error:
            last = error
        if process.poll() is not None:
            raise Failed(f"it ended with code {process.returncode}: {_tail(log)}")
        if time.monotonic() > end:
            raise Failed(f"it does not serve within {_READY:g} s ({last}): {_tail(log)}")
        time.sleep(0.25)


def _tail(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").splitlines()[-3:])[-400:]


def measure(bench: Bench, one: Started, load: Workload, *, seconds: float | None = None) -> dict[str, Any]:
    """Put a load on it until enough clean seconds are there, or for ``seconds`` and then all of them count.

    Raises:
        Failed: an answer was wrong, or there was none.
    """
    before = bench.served()
    gap, step = load.gap_us, int(load.lockstep)
    bench.tell_engines(gap_us=gap, lockstep=step, prefill_one=int(one.peer.prefill_one))
    command = [
        *(str(bench.load), "--port", str(one.port), *load.arguments()),
        *("--duration", f"{(seconds or load.longest) + _MARGIN:g}", "--engine", str(bench.engine_pid)),
        *("--cores", f"{bench.cores.proxy},{bench.cores.load}"),
        *(["--pids", ",".join(map(str, one.pids))] if one.pids else []),
        *(["--hidden", "--cached", "0"] if one.peer.hides else []),
        *(["--prefill-port", str(bench.prefill)] if one.peer.command is None else []),
    ]
    with machine.running(command, bench.cores.load, log=subprocess.PIPE) as process:
        assert process.stdout is not None
        slices: list[Slice] = []
        end: dict[str, Any] = {}
        for line in process.stdout:
            said = json.loads(line)
            if "answered" in said:
                end = said
                break
            slices.append(said)
            if seconds is None and _enough(slices, load):
                process.terminate()
    if not end:
        raise Failed("the load generator ended early")
    if end["failed"] or end["stuck"]:
        counts = ", ".join(f"{count} {kind}" for kind, count in end["failures"].items())
        raise Failed(f"{end['failed']} answers failed, {end['stuck']} never ended ({counts}): {end['example'][:160]}")
    after = bench.served()
    prefills, decodes = (now - then for now, then in zip(after, before, strict=True))
    if abs(prefills - decodes) > load.clients:
        raise Failed(f"prefill had {prefills} requests and decode {decodes}")
    if load.memory and (fewest := min((one["open"] for one in slices), default=0)) < load.clients:
        raise Failed(f"only {fewest} of {load.clients} streams were open")
    found = figures(slices, load.unit, all_of_them=seconds is not None)
    return {**found, "idle_kb": one.idle_kb, "reconnects": end["reconnects"]}


def _enough(slices: Sequence[Slice], load: Workload) -> bool:
    if load.memory:
        return len(slices) >= load.slices
    good = len(clean(slices, "cpu")) >= load.slices
    return good and (not load.paced or len(clean(slices, "delay")) >= load.slices)
