"""All state of a running proxy in one object, made once and handed to whatever needs it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from disagg_proxy.admission.gate import Gate
from disagg_proxy.admission.limits import Limits
from disagg_proxy.cluster.pairing import Pairing
from disagg_proxy.cluster.policy import POLICIES
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.discovery.service import Discovery
from disagg_proxy.flight.background import Background
from disagg_proxy.flight.drains import Drainer
from disagg_proxy.introduce import Introductions
from disagg_proxy.launch import Launcher
from disagg_proxy.stats import Stats
from disagg_proxy.stopping import Stopping
from disagg_proxy.upstream import Upstream
from disagg_proxy.upstream.kv_control import KvControl
from disagg_proxy.watch.watchdog import Watchdog

log = logging.getLogger(__name__)


class Services:
    """The parts and how they are joined.

    Args:
        clock: monotonic seconds.

    Raises:
        BindError: the registration port cannot be opened. It is held from now on.
    """

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.stats = Stats(clock)
        self.registry = Registry(clock, config.instance_expiry)
        self.pairing = Pairing(self.registry, POLICIES[config.prefill_policy], POLICIES[config.decode_policy])
        self.gate = Gate(self.pairing, self.registry, _limits(config), self.stats)
        self.background = Background()
        self.stopping = Stopping(config.shutdown_grace, clock)
        self.drainer = Drainer(self.stats.drains)
        self.discovery = Discovery(config, self.registry)
        self.kv_control = KvControl(config.kv_secret, config.connect_timeout)
        self.introductions = Introductions(self.registry, self.background, self.kv_control)
        self.launcher = Launcher(
            config, self.registry, self.pairing, self.gate, self.background, self.drainer, self.stats,
            lambda: self.upstream, self.kv_control.release,
        )  # fmt: skip
        self._upstream: Upstream | None = None
        self._watchdog: Watchdog | None = None

    @property
    def upstream(self) -> Upstream:
        """The client pool, from :meth:`start` to :meth:`stop`."""
        if self._upstream is None:
            raise RuntimeError("the services are not started")
        return self._upstream

    async def start(self) -> None:
        """Begin on the running event loop."""
        self._upstream = Upstream(self.config.connect_timeout)
        await self.discovery.start(self._upstream)
        shortest, longest = self.config.freeze_after_min, self.config.freeze_after_max
        self._watchdog = Watchdog(self.registry, self._upstream, shortest, longest, self.discovery.headers)
        self._watchdog.start()
        log.info("Instances may register on %s:%d", self.config.zmq_host, self.discovery.listener.port)

    async def stop(self) -> None:
        """Let what was sent to the instances end in the time that is left, then close everything."""
        self.stopping.begin()
        await self.stopping.wait(self.background.ended(), self.stopping.left)
        await self.background.give_up()
        if self._watchdog is not None:
            await self._watchdog.stop()
        await self.discovery.stop()
        if self._upstream is not None:
            await self._upstream.close()


def _limits(config: Config) -> Limits:
    return Limits(
        in_flight=config.max_in_flight,
        prefill=config.prefill_max_in_flight,
        decode=config.decode_max_in_flight,
        kv_buffer=config.kv_buffer_bytes,
        queue=config.max_queue,
        queue_timeout=config.queue_timeout,
    )
