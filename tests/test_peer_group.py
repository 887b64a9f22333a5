"""The services use other processes through one interface, also where there are none."""

from __future__ import annotations

import pytest

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.config import Config, StaticInstance
from disagg_proxy.discovery.listener import Listener
from disagg_proxy.peer_group import SingleProcess
from disagg_proxy.services import Services
from disagg_proxy.telemetry.page_state import PageState, page_state_of
from disagg_proxy.telemetry.stats import RegistrationCounts
from disagg_proxy.telemetry.stats_report import stats_report
from tests.conftest import LOCAL


class NoPort:
    """Announcements come from elsewhere."""

    port = 0
    traffic = RegistrationCounts(messages=7)

    def start(self) -> None:
        return

    def stop(self) -> None:
        return


class Group(SingleProcess):
    """A process that replaces worker 3, and what the services ask of its group."""

    worker = 3

    def __init__(self, left: PageState | None) -> None:
        self.pings = NoPort()
        self.calls: list[str] = []
        self._left = left

    async def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")

    def predecessor_state(self) -> PageState | None:
        return self._left

    async def drain(self, instance: Instance, draining: bool) -> None:
        self.calls.append(f"drain {draining}")

    def idle(self, instance: Instance) -> bool:
        return False


CONFIG = Config(**LOCAL, prefill=(StaticInstance("127.0.0.1:9"),))


async def test_a_single_process_is_the_whole_proxy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    services = Services(CONFIG)
    await services.start()
    try:
        assert isinstance(services.discovery.listener, Listener) and services.worker is None
        assert f"may register on 127.0.0.1:{services.discovery.listener.port}" in caplog.text
        (instance,) = services.registry.instances()
        await services.drain(instance, True)
        assert instance.draining and services.idle(instance)
        instance.direct_requests = 1
        assert not services.idle(instance)
        services.stats.failovers = 5
        overview = await services.overview()
        assert (overview.stats, overview.workers, overview.registrations.messages) == (services.stats, [], 0)
        assert services.peers.page_states() == [page_state_of(services.recorder)]
        assert "answered_by" not in stats_report(services, overview)
    finally:
        await services.stop()


async def test_one_of_several_shares_by_its_group(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    earlier = Services(CONFIG, peers=Group(None))
    earlier.event_log.add_event("ready", "a:1", "was ready")
    group = Group(page_state_of(earlier.recorder))
    services = Services(CONFIG, peers=group)
    await services.start()
    try:
        assert "may register" not in caplog.text, "the port is another process's"
        assert [e.text for e in services.event_log.events][:2] == ["was ready", "worker 3 has ended and was replaced"]
        (instance,) = services.registry.instances()
        await services.drain(instance, True)
        assert not instance.draining and not services.idle(instance), "as the group says"
        report = stats_report(services, await services.overview())
        assert (report["answered_by"], report["discovery"]["messages"]) == (3, 7)
        assert not hasattr(services, "connection_warmer"), "the first worker's"
    finally:
        await services.stop()
    assert group.calls == ["start", "drain True", "stop"]
