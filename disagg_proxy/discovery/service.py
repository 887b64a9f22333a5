"""Discovery as one part: the listener's thread feeds the registry, probes admit, silence expires."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Protocol

from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.connectors.table import kind_named
from disagg_proxy.discovery.allow import AllowList
from disagg_proxy.discovery.announcement import Announcement
from disagg_proxy.discovery.forward import Forwarder
from disagg_proxy.discovery.listener import Listener
from disagg_proxy.discovery.mailbox import Mailbox
from disagg_proxy.health.liveness import LivenessConnections
from disagg_proxy.health.prober import Prober
from disagg_proxy.http1.head_writer import header_lines
from disagg_proxy.telemetry.stats import RegistrationCounts
from disagg_proxy.upstream import Upstream

log = logging.getLogger(__name__)

_EXPIRY_LOOKS = 10
"""How often within one expiry time the silence of instances is looked at."""

_MAX_REFUSED = 2048
"""Bound on refused endpoints that are counted."""


class PingSource(Protocol):
    """Where announcements come from, and what is known of those that came."""

    @property
    def traffic(self) -> RegistrationCounts: ...

    @property
    def port(self) -> int: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Discovery:
    """Owns the registration port from its creation on, so that a port in use is noticed before anything starts.

    Args:
        pings: has the port instead, and calls :meth:`take`.
        quiet: another process of this proxy tells what becomes of the instances.

    Raises:
        BindError: the port cannot be opened.
    """

    def __init__(
        self, config: Config, registry: Registry, pings: PingSource | None = None, quiet: bool = False
    ) -> None:
        self._config = config
        self._registry = registry
        self._quiet = quiet
        self._own_port = pings is None
        self.mailbox = Mailbox(self.take)
        self.listener = pings or Listener(
            config.zmq_host, config.zmq_port, AllowList(config.allow_register), self.mailbox.put
        )
        self.refused: Counter[str] = Counter()
        key = config.engine_api_key
        self.headers = header_lines([(b"authorization", f"Bearer {key}".encode())] if key else [])
        self._forwarder = Forwarder(config.forward_registrations if pings is None else ())
        self._prober: Prober | None = None
        self._lifelines: LivenessConnections | None = None
        self._expiry: asyncio.Task[None] | None = None

    async def start(self, upstream: Upstream) -> None:
        """Take in the configured instances, then read pings."""
        self.mailbox.open()
        self._forwarder.open()
        self._registry.others_send = bool(self._config.forward_registrations)
        self._registry.watch(changed=self._log_change)
        self._prober = Prober(self._registry, upstream, self._config.probe_interval, self.headers)
        self._prober.start()
        self._lifelines = LivenessConnections(self._registry, self._config.connect_timeout, self._prober.look)
        self._lifelines.start()
        for role, named in ((Role.PREFILL, self._config.prefill), (Role.DECODE, self._config.decode)):
            for static in named:
                self._registry.add_static(role, static, kind_named(static.protocol))
        self._expiry = asyncio.get_running_loop().create_task(self._expire(), name="instance expiry")
        self.listener.start()
        if self._own_port:
            log.info("Instances may register on %s:%d", self._config.zmq_host, self.listener.port)

    async def stop(self) -> None:
        """Close the port and end all tasks."""
        # The thread may be handing over while it is asked to end, so the loop must stay free meanwhile.
        await asyncio.get_running_loop().run_in_executor(None, self.listener.stop)
        self._forwarder.close()
        if self._expiry:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)
        if self._prober:
            await self._prober.stop()
        if self._lifelines:
            await self._lifelines.stop()

    def take(self, announcements: list[Announcement]) -> None:
        """Tell the registry, and other proxies."""
        self._forwarder.pass_on(announcements)
        for a in announcements:
            if a.passed_on:
                self._registry.others_send = True
            refusal = self._registry.announce(a.role, a.http, a.kv, a.kind, a.boot)
            if refusal is None:
                continue
            name = a.http.netloc if len(self.refused) < _MAX_REFUSED else "others"
            if name not in self.refused:
                log.warning("The registration of %s %s is not accepted: %s", a.role.value, a.http.text, refusal)
            self.refused[name] += 1

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(self._config.instance_expiry / _EXPIRY_LOOKS)
            self._registry.expire()

    def _log_change(self, instance: Instance) -> None:
        level = logging.DEBUG if self._quiet else logging.WARNING if instance.state is State.LOST else logging.INFO
        log.log(level, "%s is %s: %s", instance, instance.state.value, instance.explanation)
