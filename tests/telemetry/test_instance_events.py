"""Which changes of instances become events."""

from __future__ import annotations

import pytest

from disagg_proxy.cluster.circuit_breaker import FAILURES_TO_OPEN
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.cluster.lease import Lease
from disagg_proxy.telemetry.event_log import EventLog
from disagg_proxy.telemetry.instance_events import InstanceEvents
from tests.cluster.conftest import World


class Told:
    """A world whose happenings are journalled."""

    def __init__(self) -> None:
        self.world = World()
        self.event_log = EventLog()
        self.instance_events = InstanceEvents(self.world.registry, self.event_log)
        self.prefill = self.world.ready(Role.PREFILL, 1)
        self.decode = self.world.ready(Role.DECODE, 2)
        self.event_log.events.clear()

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.event_log.events]

    def admit(self, instance: Instance) -> None:
        self.world.registry.admit(instance, {"m": {"id": "m"}})


@pytest.fixture
def told() -> Told:
    return Told()


def test_an_instance_is_admitted_and_lost_and_back(told) -> None:
    new = told.world.ready(Role.DECODE, 3)
    told.world.time += 100
    told.world.registry.expire()
    assert told.kinds == ["admitted", "lost", "lost", "lost"]
    event = told.event_log.events[0]
    assert (event.instance, event.text) == (new.key, "serves m")
    assert "no ping for 100 s" in told.event_log.events[-1].text
    told.world.ready(Role.DECODE, 3)
    assert told.kinds[4:] == ["admitted"], "a new instance is probing first, which is no event"


def test_a_probe_that_fails(told) -> None:
    told.world.registry.suspend(told.decode, "its /health answers 500")
    told.world.registry.suspend(told.decode, "its /health answers 503")
    assert told.kinds == ["probing"] and told.event_log.events[0].text == "its /health answers 500"


def test_stall_replays_and_recovery(told) -> None:
    registry = told.world.registry
    registry.freeze(told.decode, "its engine is stalled")
    told.instance_events.replayed(told.decode)
    told.instance_events.replayed(told.decode)
    registry.unfreeze(told.decode, "makes progress again after replayed prefills")
    told.admit(told.decode)
    assert told.kinds == ["frozen", "replayed", "freed", "admitted"]
    assert told.event_log.events[1].text.startswith("replayed the prefills of 2 requests")
    told.event_log.events.clear()
    registry.freeze(told.prefill, "is stalled")
    registry.request_restart(told.prefill, "is stalled; restart it")
    registry.process_ended(told.prefill)
    assert told.kinds == ["frozen", "restart_wanted", "restarted", "freed"]


def test_maintenance(told) -> None:
    registry = told.world.registry
    registry.drain(told.decode)
    registry.drain(told.decode)
    registry.drain(told.decode, False)
    assert told.kinds == ["drained", "undrained"]


def test_a_breaker_opens_and_closes(told) -> None:
    for _ in range(FAILURES_TO_OPEN + 2):
        Lease(told.world.registry, told.decode).end(failed=True)
    assert told.kinds == ["breaker_opened"]
    told.world.time += 100
    Lease(told.world.registry, told.decode).end(failed=False)
    Lease(told.world.registry, told.decode).end(failed=False)
    assert told.kinds == ["breaker_opened", "breaker_closed"]


def test_a_prefill_that_would_freeze_on_the_new_process_of_a_decode(told) -> None:
    registry = told.world.registry
    registry.kv_compatibility.record_send(told.prefill, told.decode)
    registry.suspend(told.decode, "connections are refused", gone=True)
    told.admit(told.decode)
    assert told.kinds == ["restarted", "probing", "admitted", "pair_refused"]
    refused = told.event_log.events[-1]
    assert refused.instance == told.prefill.key and told.decode.http.text in refused.text
    registry.suspend(told.decode, "x")
    told.admit(told.decode)
    assert told.kinds[4:] == ["probing", "admitted"], "reported once"


def test_a_prefill_that_fits_no_decode_is_logged_once(caplog) -> None:
    def own(weights: str) -> KvKind:
        return KvKind("disagg_kv", (("kv_model", "m"), ("kv_digest", weights)), frozenset({"tcp"}))

    def lines() -> list[str]:
        found = [record for record in caplog.records if record.levelname == "WARNING"]
        caplog.clear()
        return [record.message for record in found]

    world = World()
    InstanceEvents(world.registry, EventLog())
    InstanceEvents(world.registry, EventLog(1), logs=False)  # another worker
    world.ready(Role.DECODE, 2)
    prefill = world.ready(Role.PREFILL, 11, kind=own("a"), boot="p")
    (line,) = lines()
    assert "prefill speaks disagg_kv, decode p2p_nccl" in line, "the only decode so far"
    decode = world.ready(Role.DECODE, 12, kind=own("b"), boot="d")
    (line,) = lines()
    assert str(prefill) in line and "kv_model is m@a, on decode m@b (other weights or configuration)" in line
    for _ in range(3):
        world.ping(Role.DECODE, 12, kind=own("b"), boot="d")
        world.registry.suspend(decode, "x")
        world.registry.admit(decode, {"m": {"id": "m"}})
    assert lines() == [], "each reason once"
    world.ready(Role.DECODE, 13, "another model", kind=own("c"), boot="e")
    assert lines() == [], "it would not serve the same requests"
    world.ready(Role.DECODE, 14, kind=own("a"), boot="f")
    assert lines() == []


def test_kv_releases(told) -> None:
    told.instance_events.kv_release_ended(told.decode, "")
    told.instance_events.kv_release_ended(told.decode, "")
    told.instance_events.kv_release_ended(told.decode, "it went away")
    assert [(e.kind, e.count) for e in told.event_log.events] == [("kv_drained", 2), ("drain_failed", 1)]


def test_a_replacement_worker_reports_no_admissions(told) -> None:
    told.instance_events.quiet = True
    told.world.ready(Role.DECODE, 3)
    assert told.kinds == []


def test_instances_that_come_and_go_are_forgotten(told, monkeypatch) -> None:
    monkeypatch.setattr("disagg_proxy.telemetry.instance_events.MAX_INSTANCES", 2)
    for port in range(10, 20):
        told.world.ready(Role.DECODE, port)
        told.world.time += 100
        told.world.registry.expire()
    assert len(told.instance_events._seen) <= 5
