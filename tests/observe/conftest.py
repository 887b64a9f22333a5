"""The proxy and its pair are those of tests/simulated.py; records by themselves, on a clock that the test moves."""

from __future__ import annotations

import pytest

from disagg_proxy.observe.journal import Journal
from disagg_proxy.observe.meter import Meter
from disagg_proxy.observe.recorder import Recorder
from disagg_proxy.stats import Stats
from tests.cluster.conftest import world
from tests.simulated import machine, pair

__all__ = ["machine", "pair", "world"]


class Desk:
    """A recorder, and its times."""

    def __init__(self) -> None:
        self.time = 10.0
        self.wall = 1_000_000.0
        self.recorder = Recorder(Stats(lambda: self.time), Journal(3, lambda: self.wall), Meter(lambda: self.wall))

    @property
    def journal(self) -> Journal:
        return self.recorder.journal

    def after(self, seconds: float) -> None:
        self.time += seconds
        self.wall += seconds

    def admitted(self):
        record = self.recorder.open("/v1/completions", None)
        record.asks("m")
        record.admit()
        return record


@pytest.fixture
def desk() -> Desk:
    return Desk()
