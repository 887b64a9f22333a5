"""The processes of one proxy, as each of them sees the others: the interface, and the implementation for a single one.

With ``--workers N`` it is implemented by :class:`disagg_proxy.workers.worker_peers.WorkerPeers`. Admission, discovery
and the stall detector define what they need of other processes themselves (``Peers``, ``PingSource``, ``PeerView``); a
peer group provides them, or None where there are no other processes.
"""

from __future__ import annotations

from typing import Protocol

from disagg_proxy.admission.client_key import SharedUsage
from disagg_proxy.admission.queue import Peers
from disagg_proxy.cluster.assignment import Assignment
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.discovery.announcement import Announcement
from disagg_proxy.discovery.power import PackedReports
from disagg_proxy.discovery.service import PingSource
from disagg_proxy.health.load_reader import LoadPeers
from disagg_proxy.health.peer_view import PeerView
from disagg_proxy.placement.roles_figures import prefill_wait
from disagg_proxy.placement.roles_task import RolePeers
from disagg_proxy.telemetry.aggregate import Overview
from disagg_proxy.telemetry.page_state import PageState


class LocalProcess(Protocol):
    """What a peer group uses of the process that it runs in."""

    def announced(self, announcements: list[Announcement]) -> None:
        """Register instances whose announcements were received by another process."""

    def power_reports(self, packed: PackedReports) -> None:
        """Take what this machine's reader of GPUs has found, which runs in another process."""

    def check_engines(self) -> None:
        """Check for stalled engines now: another process has reported a change."""

    def own_overview(self) -> Overview:
        """Statistics of this process alone."""

    def own_page_state(self) -> PageState:
        """The newest records, events and steps of this process, for the page."""


class PeerGroup(RolePeers, Protocol):
    """Created before the event loop, joined to a registry, started on the loop."""

    @property
    def worker(self) -> int | None:
        """The number of this process among the workers, None where it is the only one."""

    @property
    def admission_peers(self) -> Peers | None:
        """The load and the queues of the others; from :meth:`join` on."""

    @property
    def key_usage(self) -> SharedUsage | None:
        """What the others use of the limits of client keys."""

    @property
    def pings(self) -> PingSource | None:
        """Where announcements arrive instead of at a socket of this process."""

    @property
    def peer_view(self) -> PeerView | None:
        """What the others report of stalled engines; from :meth:`join` on."""

    @property
    def load_peers(self) -> LoadPeers | None:
        """The workers that share the polling of the engines' load; from :meth:`join` on."""

    def join(self, registry: Registry, process: LocalProcess) -> None:
        """Share the load and the health of the instances in ``registry``."""

    async def start(self) -> None:
        """Begin to exchange messages. Returns when this process has what the others know, or after a time limit."""

    def stop(self) -> None:
        """Publish once more, then exchange no more messages; harmless before :meth:`start`."""

    def predecessor_state(self) -> PageState | None:
        """The last state that the process published which this one replaces; None where it replaces none."""

    async def overview(self) -> Overview:
        """Statistics of all processes together."""

    def page_states(self) -> list[PageState]:
        """The last published state of each process; current after :meth:`overview`."""

    async def drain(self, instance: Instance, draining: bool) -> None:
        """Take ``instance`` out of rotation in all processes, or put it back; returns when they follow."""

    async def assigned(self, instance: Instance) -> None:
        """Return when all processes follow the role that ``instance`` is assigned."""

    def idle(self, instance: Instance) -> bool:
        """Whether no process has a request on ``instance``, or KV waiting there."""


class SingleProcess:
    """The proxy is this process alone."""

    worker = None
    admission_peers = None
    key_usage = None
    pings = None
    peer_view = None
    load_peers = None

    def join(self, registry: Registry, process: LocalProcess) -> None:
        self._registry = registry
        self._process = process

    async def start(self) -> None:
        return

    def stop(self) -> None:
        return

    def predecessor_state(self) -> PageState | None:
        return None

    async def overview(self) -> Overview:
        return self._process.own_overview()

    def page_states(self) -> list[PageState]:
        return [self._process.own_page_state()]

    async def drain(self, instance: Instance, draining: bool) -> None:
        self._registry.drain(instance, draining)

    def decides_roles(self) -> bool:
        return True

    def assign(self, instance: Instance, assignment: Assignment) -> None:
        self._registry.assign(instance, assignment)

    def prefill_wait(self, instance: Instance) -> float:
        return prefill_wait(instance, self._registry.now())

    async def assigned(self, instance: Instance) -> None:
        return

    def idle(self, instance: Instance) -> bool:
        return instance.idle
