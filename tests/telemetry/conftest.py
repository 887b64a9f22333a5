"""The proxy and its pair are those of tests/simulated.py; records by themselves, on a clock that the test moves."""

from __future__ import annotations

import pytest

from disagg_proxy.telemetry.event_log import EventLog
from disagg_proxy.telemetry.request_recorder import RequestRecorder
from disagg_proxy.telemetry.stats import Stats
from disagg_proxy.telemetry.timeseries import TimeSeries
from tests.cluster.conftest import world
from tests.simulated import machine, pair

__all__ = ["machine", "pair", "world"]


class Desk:
    """A recorder with a monotonic and a wall clock."""

    def __init__(self) -> None:
        self.time = 10.0
        self.wall = 1_000_000.0
        self.recorder = RequestRecorder(
            Stats(lambda: self.time), EventLog(3, lambda: self.wall), TimeSeries(lambda: self.wall)
        )

    @property
    def event_log(self) -> EventLog:
        return self.recorder.event_log

    def after(self, seconds: float) -> None:
        self.time += seconds
        self.wall += seconds

    def admitted(self):
        record = self.recorder.open("/v1/completions", None)
        record.on_ready("m")
        record.on_admitted()
        return record


@pytest.fixture
def desk() -> Desk:
    return Desk()
