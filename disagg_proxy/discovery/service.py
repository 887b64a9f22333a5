"""The discovery service: pings register instances, probes admit them, missing pings expire them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Protocol

from disagg_power.book import EnergyBook
from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.connectors.table import kind_named
from disagg_proxy.discovery.allow import AllowList
from disagg_proxy.discovery.announcement import Announcement
from disagg_proxy.discovery.forward import Forwarder
from disagg_proxy.discovery.listener import Listener
from disagg_proxy.discovery.mailbox import Mailbox
from disagg_proxy.discovery.power import LocalReader, PowerReports
from disagg_proxy.discovery.proof import Proofs
from disagg_proxy.health.liveness import LivenessConnections
from disagg_proxy.health.prober import Prober
from disagg_proxy.http1.head_writer import header_lines
from disagg_proxy.telemetry.stats import RegistrationCounts
from disagg_proxy.upstream import Upstream

log = logging.getLogger(__name__)

_EXPIRY_CHECKS = 10
"""Checks for missing pings within one expiry time."""

_MAX_REFUSED = 2048
"""Bound on the endpoints whose rejected registrations are counted by name."""


class PingSource(Protocol):
    """Where announcements come from: the listener, or the supervisor of the workers."""

    @property
    def traffic(self) -> RegistrationCounts: ...

    @property
    def port(self) -> int: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Discovery:
    """Binds the registration port on creation, so that a port in use is an error before anything starts.

    Args:
        pings: another source of announcements, which calls :meth:`take`; no port is bound then.
        quiet: another worker of this proxy logs the changes of instances, so this one logs them at DEBUG.
        energy: gets what is reported of GPUs.

    Attributes:
        refused: rejected registrations by HTTP endpoint.
        power: reports of GPUs.
        headers: encoded header lines for requests to engines that are not on behalf of a client.

    Raises:
        BindError: the port cannot be bound.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        pings: PingSource | None = None,
        quiet: bool = False,
        energy: EnergyBook | None = None,
    ) -> None:
        self._config = config
        self._registry = registry
        self._quiet = quiet
        self._own_port = pings is None
        self._proofs = Proofs(config.kv_secret, config.connect_timeout, self.take, self._drop)
        self.mailbox = Mailbox(self._proofs.take)
        self.listener = pings or Listener(
            config.zmq_host, config.zmq_port, AllowList(config.allow_register), self.mailbox.put
        )
        self.refused: Counter[str] = Counter()
        self.power = PowerReports(registry, EnergyBook() if energy is None else energy, config.power_meter)
        self._reader = LocalReader(config, self.power.read) if pings is None else None
        key = config.engine_api_key
        self.headers = header_lines([(b"authorization", f"Bearer {key}".encode())] if key else [])
        self._forwarder = Forwarder(config.forward_registrations if pings is None else ())
        self._prober: Prober | None = None
        self._liveness: LivenessConnections | None = None
        self._expiry: asyncio.Task[None] | None = None

    async def start(self, upstream: Upstream) -> None:
        """Register the configured instances, then read pings."""
        self.mailbox.open()
        self._forwarder.open()
        self._registry.other_proxies = bool(self._config.forward_registrations)
        self._registry.watch(changed=self._log_change)
        self._prober = Prober(self._registry, upstream, self._config.probe_interval, self.headers)
        self._prober.start()
        self._liveness = LivenessConnections(self._registry, self._config.connect_timeout, self._prober.probe)
        self._liveness.start()
        for role, named in ((Role.PREFILL, self._config.prefill), (Role.DECODE, self._config.decode)):
            for static in named:
                self._registry.add_static(role, static, kind_named(static.protocol))
        self._expiry = asyncio.get_running_loop().create_task(self._expire(), name="instance expiry")
        self.listener.start()
        if self._reader is not None:
            self._reader.start()
        if self._own_port:
            log.info("Instances may register on %s:%d", self._config.zmq_host, self.listener.port)

    async def stop(self) -> None:
        """Close the port and cancel all tasks."""
        # The thread may be delivering to the loop while it ends, so the loop must not be blocked.
        await asyncio.get_running_loop().run_in_executor(None, self._stop_threads)
        await self._proofs.stop()
        self._forwarder.close()
        if self._expiry:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)
        if self._prober:
            await self._prober.stop()
        if self._liveness:
            await self._liveness.stop()

    def _stop_threads(self) -> None:
        self.listener.stop()
        if self._reader is not None:
            self._reader.stop()

    def reconfigure(self, config: Config) -> None:
        """Use ALLOW_REGISTER, INSTANCE_EXPIRY, PROBE_INTERVAL and CONNECT_TIMEOUT of a reload."""
        before, self._config = self._config, config
        # Made only where it changes, since looking up this machine's names can take seconds.
        if isinstance(self.listener, Listener) and config.allow_register != before.allow_register:
            self.listener.allow = AllowList(config.allow_register)
        self._proofs.timeout = config.connect_timeout
        if self._prober is not None:
            self._prober.set_interval(config.probe_interval)
        if self._liveness is not None:
            self._liveness.connect_timeout = config.connect_timeout

    def take(self, announcements: list[Announcement]) -> None:
        """Process announcements: forward them to other proxies, and register the instances."""
        self._forwarder.forward(announcements)
        for a in announcements:
            if a.passed_on:
                self._registry.other_proxies = True
            refusal = self._registry.announce(a.role, a.http, a.kv, a.kind, a.boot)
            if refusal is None:
                self._registry.note_links(a.http, a.links)
                self.power.announced(a.http.netloc, a.gpus)
                continue
            name = a.http.netloc if len(self.refused) < _MAX_REFUSED else "others"
            if name not in self.refused:
                log.warning("The registration of %s %s is not accepted: %s", a.role.value, a.http.text, refusal)
            self.refused[name] += 1

    def _drop(self, kind: str, sender: str, detail: str) -> None:
        if isinstance(self.listener, Listener):
            self.listener.drop(kind, sender, detail)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(self._config.instance_expiry / _EXPIRY_CHECKS)
            self._registry.expire()

    def _log_change(self, instance: Instance) -> None:
        level = logging.DEBUG if self._quiet else logging.WARNING if instance.state is State.LOST else logging.INFO
        log.log(level, "%s is %s: %s", instance, instance.state.value, instance.explanation)
