"""Noticing within milliseconds that an instance's process is gone: one idle connection to each, held for nothing else.

The kernel closes a dead process's sockets at once, long before three pings are missed. vLLM's server (uvicorn) sets
its idle timeout only after a first response, so a connection that never asks anything lives as long as the process
(uvicorn 0.20 - 0.54, ``protocols/http/httptools_impl.py``). An instance whose connection closed is out until a probe
admits it again, as another process. A server that closes idle connections by itself is known by being there again at
once, several times, and is then left without a lifeline.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry

log = logging.getLogger(__name__)

_AT_ONCE = 1.0
"""Seconds within which no vLLM restarts: an instance that is ready again sooner was never gone."""

_FALSE_ALARMS = 3


class Lifelines:
    """Holds a connection to every ready instance of a registry.

    Args:
        connect_timeout: seconds for one attempt.
    """

    def __init__(self, registry: Registry, connect_timeout: float) -> None:
        self._registry = registry
        self._connect_timeout = connect_timeout
        self._held: dict[Instance, asyncio.Task[None]] = {}
        self._closed_at: dict[Instance, float] = {}
        self._false_alarms: Counter[Instance] = Counter()

    def start(self) -> None:
        """Follow the registry from now on."""
        self._registry.watch(changed=self._on_change)

    async def stop(self) -> None:
        """Let go of all."""
        tasks = list(self._held.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_change(self, instance: Instance) -> None:
        if instance.state is State.LOST:
            self._closed_at.pop(instance, None)
            self._false_alarms.pop(instance, None)
        if instance.state is not State.READY or instance in self._held:
            return
        closed_at = self._closed_at.pop(instance, None)
        if closed_at is not None:
            at_once = self._registry.now() - closed_at < _AT_ONCE
            self._false_alarms[instance] = self._false_alarms[instance] + 1 if at_once else 0
        if self._false_alarms[instance] >= _FALSE_ALARMS:
            log.info("%s closes idle connections; only probes and pings will tell of its death", instance)
            return
        task = asyncio.get_running_loop().create_task(self._hold(instance), name=f"lifeline {instance}")
        self._held[instance] = task
        task.add_done_callback(lambda _: self._held.pop(instance, None))

    async def _hold(self, instance: Instance) -> None:
        await self._until_closed(instance)
        self._held.pop(instance, None)
        if instance.state is State.READY:
            self._closed_at[instance] = self._registry.now()
            self._registry.lost_contact(instance, "its server closed the connection that is held open to it")

    async def _until_closed(self, instance: Instance) -> None:
        """Return when the connection is closed, or cannot be made."""
        try:
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(instance.http.host, instance.http.port), self._connect_timeout
            )
        except (OSError, asyncio.TimeoutError):
            return
        try:
            while await reader.read(4096):
                pass
        except OSError:
            pass
        finally:
            writer.transport.abort()
