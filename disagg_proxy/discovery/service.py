"""Discovery as one part: the listener's thread feeds the registry, probes admit, silence expires."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter

from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.discovery.allow import AllowList
from disagg_proxy.discovery.announcement import Announcement
from disagg_proxy.discovery.lifeline import Lifelines
from disagg_proxy.discovery.listener import Listener
from disagg_proxy.discovery.prober import Prober
from disagg_proxy.upstream import Upstream

log = logging.getLogger(__name__)

_EXPIRY_LOOKS = 10
"""How often within one expiry time the silence of instances is looked at."""

_MAX_WAITING = 2048
"""Bound on announcements between the listener's thread and the loop, and on refused endpoints that are counted."""


class Discovery:
    """Owns the registration port from its creation on, so that a port in use is noticed before anything starts.

    Raises:
        BindError: the port cannot be opened.
    """

    def __init__(self, config: Config, registry: Registry) -> None:
        self._config = config
        self._registry = registry
        self.listener = Listener(config.zmq_host, config.zmq_port, AllowList(config.allow_register), self._deliver)
        self.refused: Counter[str] = Counter()
        key = config.engine_api_key
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, str], Announcement] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._prober: Prober | None = None
        self._lifelines: Lifelines | None = None
        self._expiry: asyncio.Task[None] | None = None

    async def start(self, upstream: Upstream) -> None:
        """Take in the configured instances, then read pings."""
        self._loop = asyncio.get_running_loop()
        self._registry.watch(changed=_log_change)
        self._prober = Prober(self._registry, upstream, self._config.probe_interval, self.headers)
        self._prober.start()
        self._lifelines = Lifelines(self._registry, self._config.connect_timeout, self._prober.look)
        self._lifelines.start()
        for role, named in ((Role.PREFILL, self._config.prefill), (Role.DECODE, self._config.decode)):
            for static in named:
                self._registry.add_static(role, static)
        self._expiry = self._loop.create_task(self._expire(), name="instance expiry")
        self.listener.start()

    async def stop(self) -> None:
        """Close the port and end all tasks."""
        # The thread may be handing over while it is asked to end, so the loop must stay free meanwhile.
        await asyncio.get_running_loop().run_in_executor(None, self.listener.stop)
        if self._expiry:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)
        if self._prober:
            await self._prober.stop()
        if self._lifelines:
            await self._lifelines.stop()

    def _deliver(self, announcements: list[Announcement]) -> None:
        """In the listener's thread: keep the newest of each instance until the loop takes them all."""
        with self._lock:
            idle = not self._waiting
            for announcement in announcements:
                if len(self._waiting) < _MAX_WAITING:
                    self._waiting[(announcement.http.netloc, announcement.kv.text)] = announcement
        if idle and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        with self._lock:
            announcements, self._waiting = self._waiting, {}
        for a in announcements.values():
            refusal = self._registry.announce(a.role, a.http, a.kv, a.kind, a.boot)
            if refusal is None:
                continue
            name = a.http.netloc if len(self.refused) < _MAX_WAITING else "others"
            if name not in self.refused:
                log.warning("The registration of %s %s is not accepted: %s", a.role.value, a.http.text, refusal)
            self.refused[name] += 1

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(self._config.instance_expiry / _EXPIRY_LOOKS)
            self._registry.expire()


def _log_change(instance: Instance) -> None:
    level = logging.INFO if instance.state is not State.LOST else logging.WARNING
    log.log(level, "%s is %s: %s", instance, instance.state.value, instance.explanation)
