"""Noticing within milliseconds that an instance's process is gone: one idle connection to each, held for nothing else.

The kernel closes a dead process's sockets at once, long before three pings are missed. vLLM's server (uvicorn) sets
its idle timeout only after a first response, so a connection that never asks anything lives as long as the process
(uvicorn 0.20 - 0.54, ``protocols/http/httptools_impl.py``). When it closes, the instance is probed at once: a refused
connection takes it out. If it answers, it may still be another process, so KV that was prefilled for the one before is
not asked from it. A server that closes idle connections by itself shows as several such answers and is then left
without a lifeline.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.runtime.within import within

log = logging.getLogger(__name__)

_FALSE_ALARMS = 3


class LivenessConnections:
    """Holds a connection to every ready instance of a registry.

    Args:
        connect_timeout: seconds for one attempt.
        probe: looks at an instance now and tells the registry.
    """

    def __init__(
        self, registry: Registry, connect_timeout: float, probe: Callable[[Instance], Awaitable[None]]
    ) -> None:
        self._registry = registry
        self._connect_timeout = connect_timeout
        self._probe = probe
        self._held: dict[Instance, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Follow the registry from now on, and be its witness of who lives."""
        self._registry.watch(changed=self._on_change)
        self._registry.has_lifeline = self._held.__contains__

    async def stop(self) -> None:
        """Let go of all."""
        tasks = list(self._held.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_change(self, instance: Instance) -> None:
        if instance.state is not State.READY or instance in self._held:
            return
        task = asyncio.get_running_loop().create_task(self._hold(instance), name=f"lifeline {instance}")
        self._held[instance] = task

    async def _hold(self, instance: Instance) -> None:
        """Until the instance is out, or its server turns out to close idle connections."""
        false_alarms = 0
        while false_alarms < _FALSE_ALARMS:
            await self._until_closed(instance)
            await self._probe(instance)
            # Whoever follows the instance shall go on from what this look found.
            self._registry.look_again(instance)
            if instance.state is not State.READY:
                self._registry.process_ended(instance)
                break
            self._registry.doubt(instance)
            false_alarms += 1
        else:
            log.info("%s closes idle connections; only probes and pings will tell of its death", instance)
        del self._held[instance]

    async def _until_closed(self, instance: Instance) -> None:
        """Return when the connection is closed, or cannot be made."""
        try:
            async with within(self._connect_timeout):
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
