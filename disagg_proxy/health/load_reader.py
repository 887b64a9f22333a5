"""Reads the load of each ready engine from its /metrics about once a second, while something in the proxy needs it.

With several workers one of them reads for all (:class:`LoadPeers`), so that an engine answers one request a second
however many workers there are. The reads are spread over the interval, at most :data:`_MAX_PER_SECOND`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Protocol

from disagg_proxy.cluster.engine_load import EngineLoad
from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.upstream import Upstream
from disagg_proxy.upstream.engine_metrics import read_metrics

INTERVAL = 1.0
"""Seconds between two reads of an engine."""

FORGET_AFTER = 5.0
"""Seconds after which a reading is dropped: the engine is not ready, does not answer, or nothing needs its load."""

_MAX_PER_SECOND = 64
"""Reads per second; with more engines each one is read less often."""

_RUNNING, _WAITING, _CONFIG = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:cache_config_info"
_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
"""The second one is the name in older versions."""
_DROPPED = ("vllm:disagg_kv_recomputed_prompts_total", "vllm:disagg_kv_unfetched_prompts_total")
"""Counters of the disagg_kv connector (``disagg_kv/outcomes.py``), on decode and on prefill."""
FILTERED = "/metrics/?" + "&".join(f"name[]={name}" for name in (_RUNNING, _WAITING, _CONFIG, *_USAGE, *_DROPPED))
"""Only what is read here: 1.2 ms of an engine's API server instead of 9.2 ms (vLLM 0.32 on a slow CPU), which it lacks
for tokens meanwhile. prometheus_client's own application, mounted below ``/metrics/``, knows ``name[]`` (vLLM 0.32,
``entrypoints/serve/instrumentator/metrics.py``); with several API servers it shows nothing by names."""

_GIVEN_UP = (b'reason="overload"', b'reason="expired"')
"""Their reasons that say that prefill gave up KV: too much of it waited, or it waited for too long."""
_SIZE = re.compile(rb'[{,]kv_cache_size_tokens="(\d+)"')
_BLOCKS = re.compile(rb'[{,]num_gpu_blocks="(\d+)"')
_BLOCK_SIZE = re.compile(rb'[{,]block_size="(\d+)"')


def engine_load(metrics: bytes, at: float, ranks: int = 1) -> EngineLoad | None:
    """The load in the text of /metrics; None where it shows none, as with ``--disable-log-stats``.

    A data parallel engine has a sample for each of its engine cores: requests and capacities are added up, of the
    usage it is the mean. Only the lines that are needed are looked at.

    Args:
        at: clock reading of :meth:`Registry.now`, in seconds.
        ranks: tensor parallel size: each rank counts the prompts whose KV was dropped.
    """
    try:
        running, waiting = _values(metrics, _RUNNING), _values(metrics, _WAITING)
        usage = _values(metrics, _USAGE[0]) or _values(metrics, _USAGE[1])
        if not (running or waiting or usage):
            return None
        dropped = [sample for name in _DROPPED for sample in _samples(metrics, name)]
        lost = sum(value for labels, value in dropped if any(reason in labels for reason in _GIVEN_UP))
        return EngineLoad(
            at,
            running=int(sum(running)) if running else None,
            waiting=int(sum(waiting)) if waiting else None,
            kv_usage=min(1.0, max(0.0, sum(usage) / len(usage))) if usage else None,
            kv_capacity_tokens=_capacity(metrics),
            kv_dropped=round(lost / ranks) if dropped else None,
        )
    except (ValueError, OverflowError):
        # Not a number: the text is not vLLM's.
        return None


def _samples(metrics: bytes, name: str) -> list[tuple[bytes, float]]:
    """Labels and value of each sample of a metric. Raises ValueError when a value is not a number."""
    found = []
    wanted = f"\n{name}".encode()
    begin = metrics.find(wanted)
    while begin >= 0:
        end = metrics.find(b"\n", begin + 1)
        end = len(metrics) if end < 0 else end
        rest = metrics[begin + len(wanted) : end]
        if rest.startswith((b"{", b" ")):
            labels, _, value = rest.rpartition(b" ")
            found.append((labels, float(value)))
        begin = metrics.find(wanted, end)
    return found


def _values(metrics: bytes, name: str) -> list[float]:
    return [value for _, value in _samples(metrics, name)]


def _capacity(metrics: bytes) -> int | None:
    """Tokens that the KV cache holds, by the labels of ``vllm:cache_config_info``.

    ``kv_cache_size_tokens`` is that of one engine core, and right for models with several KV cache groups too; older
    versions lack it. ``num_gpu_blocks`` is the sum over all engine cores (vLLM 0.32, ``v1/engine/core_client.py``).
    """
    infos = [labels for labels, _ in _samples(metrics, _CONFIG)]
    if sizes := [int(size[1]) for labels in infos if (size := _SIZE.search(labels))]:
        return sum(sizes)
    blocks = [(_BLOCKS.search(labels), _BLOCK_SIZE.search(labels)) for labels in infos]
    return max((int(count[1]) * int(size[1]) for count, size in blocks if count and size), default=None)


class LoadPeers(Protocol):
    """The other workers of this proxy, of which one reads the load of the engines for all."""

    def reads_loads(self, needed: bool) -> bool:
        """Report whether this worker needs the load; whether any does, and this worker is the one that reads it."""

    def share_load(self, instance: Instance) -> None:
        """Pass the reading of ``instance`` on to the other workers."""


class LoadReader:
    """Fills :attr:`Instance.engine_load` of the ready instances of a registry.

    Args:
        headers: encoded header lines for GET /metrics, such as the engines' key.
        needed: whether something in this process needs the load now.
        peers: the other workers of this proxy; None without any.
    """

    def __init__(
        self,
        registry: Registry,
        upstream: Upstream,
        headers: bytes,
        needed: Callable[[], bool],
        peers: LoadPeers | None = None,
    ) -> None:
        self._registry = registry
        self._upstream = upstream
        self._headers = headers
        self._needed = needed
        self._peers = peers
        self._task: asyncio.Task[None] | None = None
        self._reads: dict[Instance, asyncio.Task[None]] = {}
        self._unfiltered: set[Instance] = set()
        """Those that show nothing by names of metrics."""

    def start(self) -> None:
        """Read from now on."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="engine load")

    async def stop(self) -> None:
        """Cancel all tasks."""
        tasks = [*self._reads.values(), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._forget()
            ready = self._ready() if self._reads_loads() else []
            pause = max(INTERVAL, len(ready) / _MAX_PER_SECOND) / max(1, len(ready))
            for instance in ready:
                if instance not in self._reads:
                    task = asyncio.get_running_loop().create_task(self.read(instance), name=f"load of {instance}")
                    self._reads[instance] = task
                    task.add_done_callback(lambda _, read=instance: self._reads.pop(read, None))  # type: ignore[misc]
                await asyncio.sleep(pause)
            if not ready:
                await asyncio.sleep(INTERVAL)

    def _reads_loads(self) -> bool:
        needed = self._needed()
        return needed if self._peers is None else self._peers.reads_loads(needed)

    def _ready(self) -> list[Instance]:
        return [i for i in self._registry.instances() if i.state is State.READY]

    def _forget(self) -> None:
        oldest = self._registry.now() - FORGET_AFTER
        self._unfiltered = {i for i in self._unfiltered if i.state is State.READY and self._registry.knows(i)}
        for instance in self._registry.instances():
            if instance.engine_load is not None and instance.engine_load.at < oldest:
                instance.engine_load = None

    async def read(self, instance: Instance) -> None:
        """Read the load of an instance once. Without an answer it keeps the reading that it has."""
        load = None
        if instance not in self._unfiltered:
            metrics = await read_metrics(self._upstream, instance, self._headers, FILTERED)
            if metrics is None:
                return
            load = engine_load(metrics, self._registry.now(), instance.kind.ranks)
        if load is None:
            self._unfiltered.add(instance)
            metrics = await read_metrics(self._upstream, instance, self._headers)
            if metrics is None:
                return
            load = engine_load(metrics, self._registry.now(), instance.kind.ranks)
        instance.engine_load = load
        if self._peers is not None and instance.engine_load is not None:
            self._peers.share_load(instance)
