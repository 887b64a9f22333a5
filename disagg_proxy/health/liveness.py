"""Detects within milliseconds that an instance's process has ended, by one idle connection to each ready instance.

The kernel closes a dead process's sockets at once, long before three pings are missed. vLLM's server (uvicorn) starts
its idle timeout only after a first response, so a connection without requests lives as long as the process
(uvicorn 0.20 - 0.54, ``protocols/http/httptools_impl.py``). When it closes, the instance is probed at once: a refused
connection suspends it. If the probe succeeds it may still be another process, so KV that an earlier process held is
not used. A server that closes idle connections looks like several such cases; no connection to it is held after that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.runtime.within import within

log = logging.getLogger(__name__)

_MAX_FALSE_ALARMS = 3
"""Closed connections with a successful probe after which none is held to an instance."""


class LivenessConnections:
    """Holds an idle connection to every ready instance of a registry.

    Args:
        connect_timeout: in seconds.
        probe: probes an instance now and reports the result to the registry.
    """

    def __init__(
        self, registry: Registry, connect_timeout: float, probe: Callable[[Instance], Awaitable[None]]
    ) -> None:
        self._registry = registry
        self.connect_timeout = connect_timeout
        self._probe = probe
        self._held: dict[Instance, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Follow the registry, and take over from it the decision whether a process has ended."""
        self._registry.watch(changed=self._on_change)
        self._registry.has_liveness_connection = self._held.__contains__

    async def stop(self) -> None:
        """Close all connections."""
        tasks = list(self._held.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_change(self, instance: Instance) -> None:
        if instance.state is not State.READY or instance in self._held:
            return
        task = asyncio.get_running_loop().create_task(self._hold(instance), name=f"liveness {instance}")
        self._held[instance] = task

    async def _hold(self, instance: Instance) -> None:
        """Hold a connection until the instance is suspended, or its server proves to close idle connections."""
        false_alarms = 0
        while false_alarms < _MAX_FALSE_ALARMS:
            await self._until_closed(instance)
            await self._probe(instance)
            # The prober's own task continues from this result, without waiting for its interval.
            self._registry.recheck(instance)
            if instance.state is not State.READY:
                self._registry.process_ended(instance)
                break
            self._registry.maybe_restarted(instance)
            false_alarms += 1
        else:
            log.info("%s closes idle connections: only probes and pings can detect that its process ends", instance)
        del self._held[instance]

    async def _until_closed(self, instance: Instance) -> None:
        """Return when the connection is closed, or cannot be opened."""
        try:
            async with within(self.connect_timeout):
                reader, writer = await asyncio.open_connection(instance.http.host, instance.http.port)
        except (OSError, asyncio.TimeoutError):
            return
        try:
            while await reader.read(4096):
                pass
        except OSError:
            pass
        finally:
            writer.transport.abort()
