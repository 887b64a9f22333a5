"""Composition root: creates all parts of a proxy and joins them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from disagg_power.book import EnergyBook
from disagg_proxy.admission.queue import AdmissionQueue, Limits
from disagg_proxy.admission.token_estimate import PromptSizes
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.policies import DECODE_POLICIES, PREFILL_POLICIES
from disagg_proxy.cluster.policies.table import PrefixTable
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.selection import Selection
from disagg_proxy.config import Config
from disagg_proxy.config.reload import Reloads
from disagg_proxy.connectors.base import Engines
from disagg_proxy.connectors.disagg_kv import ConnectionWarmer
from disagg_proxy.connectors.kv_release import KvReleaser
from disagg_proxy.coordinator.coordinator import Coordinator
from disagg_proxy.discovery.announcement import Announcement
from disagg_proxy.discovery.power import PackedReports
from disagg_proxy.discovery.service import Discovery
from disagg_proxy.health.load_reader import LoadReader
from disagg_proxy.health.stall_detector import StallDetector
from disagg_proxy.keys.key_table import KeyTable
from disagg_proxy.openai.prefix_hash import ENDS
from disagg_proxy.peer_group import PeerGroup, SingleProcess
from disagg_proxy.placement.elastic import Elastic
from disagg_proxy.placement.goals import Goals
from disagg_proxy.placement.roles import RoleLimits
from disagg_proxy.placement.roles_task import Roles
from disagg_proxy.runtime.background import Background
from disagg_proxy.runtime.shutdown import Shutdown
from disagg_proxy.runtime.write_coalescing import WriteBatch
from disagg_proxy.telemetry import page_view
from disagg_proxy.telemetry.access_log import AccessLog
from disagg_proxy.telemetry.aggregate import Overview, counts_of, gauges_of, seen_of
from disagg_proxy.telemetry.clock_status import ClockStatus
from disagg_proxy.telemetry.energy import totals_of
from disagg_proxy.telemetry.event_log import EventLog
from disagg_proxy.telemetry.instance_events import InstanceEvents
from disagg_proxy.telemetry.page_state import PageState, inherit, page_state_of
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.telemetry.request_recorder import RequestRecorder
from disagg_proxy.telemetry.stats import Stats
from disagg_proxy.telemetry.timeseries import TimeSeries
from disagg_proxy.upstream import Upstream
from disagg_proxy.upstream.kv_control import KvControl

if TYPE_CHECKING:
    from disagg_proxy.telemetry.tracing import SpanExporter

_SAMPLE_INTERVAL = 1.0
"""Seconds between two samples of the time series."""

_PAGE_OPEN = 5.0
"""Seconds since the last view for the page within which it counts as open."""

_ENERGY_INTERVAL = 2.5
"""Seconds between two intervals of the energy figures: two in each step of the time series."""


class Services:
    """All state of one process of the proxy.

    Args:
        clock: monotonic seconds.
        peers: the other processes of this proxy; None for a single process.

    Raises:
        BindError: the registration port cannot be opened.
        KeysFileError: API_KEYS_FILE cannot be used.
    """

    def __init__(
        self, config: Config, clock: Callable[[], float] = time.monotonic, peers: PeerGroup | None = None
    ) -> None:
        self.config = config
        self.peers = peers or SingleProcess()
        self.worker = self.peers.worker
        self.reloads = Reloads(quiet=bool(self.worker))
        self.reloads.on_config(self._reconfigure)
        self.stats = Stats(clock)
        self.keys = KeyTable(config, self.stats, self.peers.key_usage)
        self.reloads.on_config(self.keys.configure)
        self.reloads.on_reload(self.keys.reload)
        self.event_log = EventLog(self.worker or 0)
        self.clock_status = ClockStatus(config.power_status_file)
        self.recorder = RequestRecorder(self.stats, self.event_log, TimeSeries())
        self.registry = Registry(clock, config.instance_expiry)
        self.recorder.served = self.registry.has_model
        self.recorder.settle_key = self.keys.settle
        self.energy = EnergyBook()
        self.traces = _traces(config, self.worker, self.energy)
        if self.traces is not None:
            self.recorder.sinks.append(self.traces.take)
        self.instance_events = InstanceEvents(self.registry, self.event_log, logs=not self.worker)
        self.selection = Selection(
            self.registry, PREFILL_POLICIES[config.prefill_policy], DECODE_POLICIES[config.decode_policy],
            table=PrefixTable(ENDS), bound=config.load_bound,
        )  # fmt: skip
        self.elastic = Elastic(self.registry, _goals(config))
        self.selection.set_chooser(self._chooser(config))
        self.recorder.learn_first_token = self.elastic.learn_first_token
        self.recorder.learn_end = self._learn
        self.peers.join(self.registry, self)
        self.admission_queue = AdmissionQueue(
            self.selection, self.registry, _limits(config), self.stats, self.peers.admission_peers
        )
        self.roles = Roles(self.registry, self.peers, self._prefill_wait, _moves_roles(config), _role_limits(config))
        self.background = Background()
        self.write_batch = WriteBatch()
        self.shutdown = Shutdown(config.shutdown_grace, clock)
        self.discovery = Discovery(config, self.registry, self.peers.pings, quiet=bool(self.worker), energy=self.energy)
        self.kv_control = KvControl(config.kv_secret, config.connect_timeout)
        if not self.worker:
            self.connection_warmer = ConnectionWarmer(self.registry, self.background, self.kv_control)
        self.sizes = PromptSizes(learns=_needs_sizes(config), trusts=bool(config.kv_buffer_tokens))
        self.engines = Engines(
            lambda: self.upstream, self.registry, config, self.background, self.sizes,
            KvReleaser(self.stats.kv_releases, self.instance_events.kv_release_ended), self.kv_control,
        )  # fmt: skip
        self.coordinator = Coordinator(self.engines, self.selection, self.admission_queue, self.recorder, self.traces)
        self._upstream: Upstream | None = None
        self._stall_detector: StallDetector | None = None
        self._load_reader: LoadReader | None = None
        self._viewed_at = -_PAGE_OPEN
        self._access_log: AccessLog | None = None
        self._sample_timer: asyncio.TimerHandle | None = None
        self._energy_task: asyncio.Task[None] | None = None

    @property
    def upstream(self) -> Upstream:
        """The client pool, from :meth:`start` to :meth:`stop`."""
        if self._upstream is None:
            raise RuntimeError("the services are not started")
        return self._upstream

    async def start(self) -> None:
        """Start all parts on the running event loop."""
        self._upstream = Upstream(self.config.connect_timeout, self.write_batch)
        await self.discovery.start(self._upstream)
        shortest, longest = self.config.freeze_after_min, self.config.freeze_after_max
        self._stall_detector = StallDetector(
            self.registry, self._upstream, shortest, longest, self.discovery.headers, self.peers.peer_view,
            self.instance_events.replayed, lambda: self.admission_queue.waiting,
        )  # fmt: skip
        self._stall_detector.start()
        self._load_reader = LoadReader(
            self.registry, self._upstream, self.discovery.headers, self._loads_needed, self.peers.load_peers
        )
        self._load_reader.start()
        self.roles.start()
        self._sample()
        if self.config.power_meter:
            self._energy_task = asyncio.get_running_loop().create_task(self._mark_energy(), name="energy")
        if self.config.access_log != "off":
            self._access_log = AccessLog(self.config.access_log, self.worker, self.stats, self.energy)
            self.recorder.sinks.append(self._access_log.take)
        if (left := self.peers.predecessor_state()) is not None:
            inherit(self.recorder, left)
            self.event_log.add_event("worker_replaced", None, f"worker {self.worker} has ended and was replaced")
            self.instance_events.quiet = True
        await self.peers.start()
        self.instance_events.quiet = False

    async def stop(self) -> None:
        """Wait for work on the instances within the shutdown grace, then close everything."""
        self.shutdown.begin()
        await self.shutdown.wait(self.background.ended(), self.shutdown.remaining)
        await self.background.cancel_all()
        if self._sample_timer is not None:
            self._sample_timer.cancel()
        if self._energy_task is not None:
            self._energy_task.cancel()
            await asyncio.gather(self._energy_task, return_exceptions=True)
        await self.roles.stop()
        if self._stall_detector is not None:
            await self._stall_detector.stop()
        if self._load_reader is not None:
            await self._load_reader.stop()
        await self.discovery.stop()
        if self._access_log is not None:
            await self._access_log.stop()
        if self.traces is not None:
            await self.traces.stop()
        if self._upstream is not None:
            await self._upstream.close()
        self.peers.stop()

    def _reconfigure(self, config: Config) -> None:
        """Use the settings of a reload (config/reload.py): in requests from now on, and in timers that start later."""
        self.config = self.engines.config = config
        self.registry.set_expiry(config.instance_expiry)
        self.selection.set_policies(
            PREFILL_POLICIES[config.prefill_policy], DECODE_POLICIES[config.decode_policy], config.load_bound
        )
        self.elastic.goals = _goals(config)
        self.selection.set_chooser(self._chooser(config))
        self.roles.configure(_moves_roles(config), _role_limits(config))
        self.coordinator.policies_changed()
        self.sizes.configure(learns=_needs_sizes(config), trusts=bool(config.kv_buffer_tokens))
        self.admission_queue.set_limits(_limits(config))
        self.shutdown.grace = config.shutdown_grace
        self.discovery.reconfigure(config)
        self.kv_control.timeout = config.connect_timeout
        if self._upstream is not None:
            self._upstream.connect_timeout = config.connect_timeout
        if self._stall_detector is not None:
            self._stall_detector.set_bounds(config.freeze_after_min, config.freeze_after_max)

    def _prefill_wait(self, instance: Instance) -> float:
        """Seconds that prompts wait for prefill on ``instance``: as predicted, else as seen by all workers."""
        predicted = self.elastic.prefill_wait(instance)
        return self.peers.prefill_wait(instance) if predicted is None else predicted

    def _chooser(self, config: Config) -> Elastic | None:
        return self.elastic if config.placement == "elastic" else None

    def _learn(self, record: RequestRecord) -> None:
        """A request has ended."""
        if record.outcome == "ok":
            if tokens := record.output_tokens or record.pieces:
                self.sizes.outputs.observe(record.model, tokens)
            self.elastic.learn_end(record)

    def placement_report(self) -> dict[str, Any]:
        """What the placement has learnt, as this process sees it."""
        return {"mode": self.config.placement, **self.elastic.report()}

    # -- what /stats, /metrics and operators see: all processes of the proxy together

    async def overview(self) -> Overview:
        """Statistics of all processes together."""
        return await self.peers.overview()

    async def page_view(self) -> dict[str, Any]:
        """The data of the page: docs/observe.md."""
        self._viewed_at = self.registry.now()
        overview = await self.overview()
        return page_view.view(self, overview, self.peers.page_states())

    async def drain(self, instance: Instance, draining: bool) -> None:
        """Take an instance out of rotation for maintenance, or put it back."""
        await self.peers.drain(instance, draining)

    async def set_role(self, instance: Instance, role: Role | None) -> None:
        """Assign a role by hand; None leaves it to the proxy again. Returns when all processes follow."""
        self.roles.set_by_hand(instance, role)
        await self.peers.assigned(instance)

    def not_serving(self) -> str:
        """Why nothing is answered although requests wait; empty while the proxy serves."""
        return "" if self._stall_detector is None else self._stall_detector.serving.not_serving()

    def idle(self, instance: Instance) -> bool:
        """Whether the instance's process could end now without losing a request."""
        return self.peers.idle(instance)

    # -- what the peer group uses (peer_group.LocalProcess)

    def announced(self, announcements: list[Announcement]) -> None:
        """Register instances whose announcements were received by another process."""
        self.discovery.take(announcements)

    def power_reports(self, packed: PackedReports) -> None:
        """Take what the reader of another process has found."""
        self.discovery.power.read(packed)

    def check_engines(self) -> None:
        """Check for stalled engines now: another process has reported a change."""
        if self._stall_detector is not None:
            self._stall_detector.check()

    def own_overview(self) -> Overview:
        """Statistics of this process alone."""
        return Overview(
            self.stats,
            self.discovery.listener.traffic,
            self.discovery.refused,
            len(self.background),
            self.admission_queue.waiting,
            counts_of(self.registry.instances()),
            seen_of(self.registry.instances()),
            gauges_of(self.registry.instances(), self.registry.now()),
        )

    def own_page_state(self) -> PageState:
        """The newest records, events and steps of this process, for the page."""
        return page_state_of(self.recorder)

    def _loads_needed(self) -> bool:
        """Whether the load that engines show is needed: by placement, by roles, or by a page open in this process."""
        used = self.config.placement == "elastic" or self.roles.automatic
        return used or self.registry.now() - self._viewed_at < _PAGE_OPEN

    def _sample(self) -> None:
        """Record the current load for the page's charts, and look at the clocks."""
        # Every worker has the metrics, one of them the events.
        if (changed := self.clock_status.poll()) is not None and not self.worker:
            self.event_log.add_event(changed[0], None, changed[1])
        kv = self.config.kv_bytes_per_token * sum(i.kv_waiting_tokens for i in self.registry.instances())
        self.recorder.timeseries.sample(self.stats.in_flight, self.admission_queue.waiting, kv)
        self._sample_timer = asyncio.get_running_loop().call_later(_SAMPLE_INTERVAL, self._sample)

    async def _mark_energy(self) -> None:
        """Divide the energy by what all processes of the proxy have served."""
        while True:
            await asyncio.sleep(_ENERGY_INTERVAL)
            if self.energy:
                try:
                    overview = await self.overview()
                except RuntimeError:
                    continue  # the supervisor has not published yet
                self.energy.mark(self.registry.now(), totals_of(overview.stats), time.time())


def _traces(config: Config, worker: int | None, energy: EnergyBook) -> SpanExporter | None:
    if not config.traces:
        return None
    from disagg_proxy.telemetry.tracing import SpanExporter

    return SpanExporter(worker, energy)


def _goals(config: Config) -> Goals:
    return Goals(config.slo_ttft_ms / 1000, config.slo_tpot_ms / 1000)


def _moves_roles(config: Config) -> bool:
    return config.roles == "auto" or (config.roles == "placement" and config.placement == "elastic")


def _role_limits(config: Config) -> RoleLimits:
    goals, limits = _goals(config), RoleLimits()
    return replace(
        limits,
        # Admission keeps to the SLO where it can, so moves begin before it.
        prefill_wait=goals.ttft / 2 or limits.prefill_wait,
        token_gap=0.9 * goals.tpot or None,
        in_flight=config.decode_max_in_flight,
    )


def _needs_sizes(config: Config) -> bool:
    """Whether the sizes of prompts are to be learnt although no decode has a KV buffer."""
    return bool(config.decode_alone_below) or config.placement == "elastic"


def _limits(config: Config) -> Limits:
    return Limits(
        in_flight=config.max_in_flight,
        prefill=config.prefill_max_in_flight,
        decode=config.decode_max_in_flight,
        kv_tokens=config.kv_buffer_tokens,
        queue=config.max_queue,
        queue_timeout=config.queue_timeout,
    )
