"""Opens and closes the records of requests, and adds them up: totals, latencies, and the traffic of each pair."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from disagg_proxy.telemetry.event_log import EventLog
from disagg_proxy.telemetry.request_record import GAP_SAMPLE_INTERVAL, RequestRecord
from disagg_proxy.telemetry.stats import Stats
from disagg_proxy.telemetry.timeseries import TimeSeries

_MAX_FLOWS = 4096
_MAX_MODELS = 64

Sink = Callable[[RequestRecord], None]
"""Called with each record when its request has ended; must not block or raise."""


@dataclass(slots=True)
class Flow:
    """The requests of one pair, by the keys of its instances; prefill is None where one engine serves alone."""

    prefill: str | None
    decode: str
    in_flight: int = 0
    total: int = 0


class RequestRecorder:
    """Creates the records of one process and adds them to its totals.

    Attributes:
        clock: monotonic seconds.
        force_closing: whether the proxy is closing exchanges because the grace time of its shutdown is over.
        served: tells whether some instance serves a model; only such names become label values.
        settle_key: called with each record of a client that has a key of API_KEYS_FILE.
        learn_first_token: called with each record of a forecast request at the first byte of its streamed answer.
        learn_end: called with each record when its request has ended.
        sinks: called with each record when its request has ended.
        flows: by the keys of prefill and decode.
    """

    def __init__(self, stats: Stats, event_log: EventLog, timeseries: TimeSeries) -> None:
        self.clock = stats.clock
        self.stats = stats
        self.event_log = event_log
        self.timeseries = timeseries
        self.sinks: list[Sink] = []
        self.flows: dict[tuple[str | None, str], Flow] = {}
        self.force_closing = False
        self.settle_key: Sink = lambda record: None
        self.learn_first_token: Sink = lambda record: None
        self.learn_end: Sink = lambda record: None
        self.served: Callable[[str], bool] = lambda model: False
        self._models: set[str] = set()
        self._phase = 0

    @classmethod
    def standalone(cls, clock: Callable[[], float] = time.monotonic) -> RequestRecorder:
        """A recorder with stats, event log and time series of its own, for tests and benchmarks."""
        return cls(Stats(clock), EventLog(), TimeSeries())

    def open(self, route: str, client_id: str | None, own_id: str = "") -> RequestRecord:
        """Open the record of a request whose body is complete. Its ids: :class:`RequestRecord`."""
        self._phase = phase = self._phase % GAP_SAMPLE_INTERVAL + 1
        return RequestRecord(self, route, client_id, own_id, phase)

    def track_flow(self, record: RequestRecord) -> None:
        """Count the request for the pair of its current attempt, and no longer for that of the previous one."""
        if record.flow is not None:
            record.flow.in_flight -= 1
        assert record.decode is not None and record.way is not None
        self.stats.ways[record.way] += 1
        pair = (record.prefill, record.decode)
        flow = self.flows.get(pair)
        if flow is None:
            if len(self.flows) >= _MAX_FLOWS:
                self.flows = {key: one for key, one in self.flows.items() if one.in_flight}
            flow = self.flows[pair] = Flow(*pair)
        flow.in_flight += 1
        flow.total += 1
        record.flow = flow

    def add_ttft(self, seconds: float) -> None:
        """Count the time to first token of a streamed response."""
        self.stats.ttft.add(seconds)
        self.timeseries.now.ttft.add(seconds)

    def add_gap(self, seconds: float, chunks: int) -> None:
        """Count a gap between two chunks of a response, and ``chunks`` relayed since the last call."""
        stats, step = self.stats, self.timeseries.now
        stats.pieces += chunks
        step.pieces += chunks
        stats.gap.add(seconds)
        step.gap.add(seconds)

    def add_chunks(self, chunks: int) -> None:
        """Count chunks of a response relayed since the last call."""
        self.stats.pieces += chunks
        self.timeseries.now.pieces += chunks

    def close(self, record: RequestRecord) -> None:
        """Add a request that has ended to the totals, the event log and the sinks."""
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
            if record.prefill is None:
                stats.alone_prompt_tokens += record.prompt_tokens - (record.cached_tokens or 0)
        if record.output_tokens:
            stats.outputs.add(record.output_tokens)
            stats.output_tokens += record.output_tokens
            step.output_tokens += record.output_tokens
        elif record.pieces:
            stats.uncounted_chunks += record.pieces
        if record.key is not None:
            self._count_key(record.key, record)
        self.event_log.add(record)
        self.learn_end(record)
        for sink in self.sinks:
            sink(record)

    def _count_key(self, key: str, record: RequestRecord) -> None:
        stats = self.stats
        stats.key_requests[f"{key}\t{record.outcome}"] += 1
        stats.key_tokens[f"{key}\tprompt"] += record.prompt_tokens or 0
        stats.key_tokens[f"{key}\tgeneration"] += record.output_tokens or 0
        self.settle_key(record)

    def _labels(self, record: RequestRecord) -> str:
        """Route, outcome, cause and model, joined by tabs. At most 64 served models get a label value of their own."""
        model = record.model or "unknown"
        if model not in self._models:
            if len(self._models) < _MAX_MODELS and record.model and self.served(record.model):
                self._models.add(model)
            elif record.model:
                model = "other"
        return f"{record.route}\t{record.outcome}\t{record.cause or ''}\t{model}"
