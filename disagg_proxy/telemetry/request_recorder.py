"""Opens and closes the records of requests, and adds up what they tell: totals, latencies, and who works with whom."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from disagg_proxy.telemetry.event_log import EventLog
from disagg_proxy.telemetry.request_record import EVERY, RequestRecord
from disagg_proxy.telemetry.stats import Stats
from disagg_proxy.telemetry.timeseries import TimeSeries

_MOST_FLOWS = 4096
_MOST_MODELS = 64

Sink = Callable[[RequestRecord], None]
"""Told of each request when it has ended; must not block or raise."""


@dataclass(slots=True)
class Flow:
    """Requests of one prefill and one decode; prefill is None for those that decode serves alone."""

    prefill: str | None
    decode: str
    in_flight: int = 0
    total: int = 0


class RequestRecorder:
    """What records need, and what becomes of them.

    Attributes:
        clock: monotonic seconds.
        cutting_off: whether exchanges are ended by the proxy now, since the time of its shutdown is over.
        served: whether some instance serves a model; clients may name any.
        sinks: who else is told of each record in the end.
        flows: by the keys of the instances.
    """

    def __init__(self, stats: Stats, event_log: EventLog, timeseries: TimeSeries) -> None:
        self.clock = stats.clock
        self.stats = stats
        self.event_log = event_log
        self.timeseries = timeseries
        self.sinks: list[Sink] = []
        self.flows: dict[tuple[str | None, str], Flow] = {}
        self.cutting_off = False
        self.served: Callable[[str], bool] = lambda model: False
        self._models: set[str] = set()
        self._turn = 0

    @classmethod
    def alone(cls, clock: Callable[[], float] = time.monotonic) -> RequestRecorder:
        """One with nothing around it."""
        return cls(Stats(clock), EventLog(), TimeSeries())

    def open(self, route: str, client_id: str | None) -> RequestRecord:
        """A request's body is complete."""
        self._turn = turn = self._turn % EVERY + 1
        return RequestRecord(self, route, client_id, turn)

    def follow(self, record: RequestRecord) -> None:
        """The request was put on the instances that it names, and may have been on others before."""
        if record.flow is not None:
            record.flow.in_flight -= 1
        assert record.decode is not None
        between = (record.prefill, record.decode)
        flow = self.flows.get(between)
        if flow is None:
            if len(self.flows) >= _MOST_FLOWS:
                self.flows = {key: one for key, one in self.flows.items() if one.in_flight}
            flow = self.flows[between] = Flow(*between)
        flow.in_flight += 1
        flow.total += 1
        record.flow = flow

    def answered(self, seconds: float) -> None:
        """A streamed answer has begun."""
        self.stats.ttft.add(seconds)
        self.timeseries.now.ttft.add(seconds)

    def measured(self, seconds: float, pieces: int) -> None:
        """A gap between two pieces of an answer, and so many pieces more."""
        stats, step = self.stats, self.timeseries.now
        stats.pieces += pieces
        step.pieces += pieces
        stats.gap.add(seconds)
        step.gap.add(seconds)

    def passed(self, pieces: int) -> None:
        """So many more pieces of an answer."""
        self.stats.pieces += pieces
        self.timeseries.now.pieces += pieces

    def close(self, record: RequestRecord) -> None:
        """The request has ended."""
        stats, step = self.stats, self.timeseries.now
        if record.admitted is not None:
            stats.in_flight -= 1
        if record.flow is not None:
            record.flow.in_flight -= 1
        stats.outcomes[record.outcome] += 1
        step.outcomes[record.outcome] += 1
        stats.labelled[self._labels(record)] += 1
        if record.prompt_tokens:
            stats.prompts.add(record.prompt_tokens)
            stats.prompt_tokens += record.prompt_tokens
            stats.cached_tokens += record.cached_tokens or 0
            step.prompt_tokens += record.prompt_tokens
        if record.output_tokens:
            stats.outputs.add(record.output_tokens)
            stats.output_tokens += record.output_tokens
            step.output_tokens += record.output_tokens
        self.event_log.add(record)
        for sink in self.sinks:
            sink(record)

    def _labels(self, record: RequestRecord) -> str:
        """Route, outcome, cause and model. Only so many models have a label of their own."""
        model = record.model or "unknown"
        if model not in self._models:
            if len(self._models) < _MOST_MODELS and record.model and self.served(record.model):
                self._models.add(model)
            elif record.model:
                model = "other"
        return f"{record.route}\t{record.outcome}\t{record.cause or ''}\t{model}"
