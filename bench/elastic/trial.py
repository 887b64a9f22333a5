"""One run: a workload on the engines of one arm, every choice made by the proxy's own parts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Many
from dataclasses import dataclass

from bench.elastic.arms import Arm
from bench.virtual.clock import VirtualLoop
from bench.virtual.engine import Engine, Sequence, Transfer
from bench.virtual.proxy import MODEL, VirtualProxy
from bench.virtual.requests import Ask, Session, traits_of, weighted_quantile
from disagg_proxy.admission.queue import Demand, Limits
from disagg_proxy.admission.token_estimate import OutputEstimator
from disagg_proxy.cluster.choice import PlacementPreference, Wish
from disagg_proxy.cluster.engine_load import EngineLoad
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.lease import Placement
from disagg_proxy.cluster.policies import Traits
from disagg_proxy.connectors.disagg_kv import KIND
from disagg_proxy.errors import ProxyError
from disagg_proxy.placement.elastic import Elastic
from disagg_proxy.placement.goals import Goals
from disagg_proxy.telemetry.event_log import EventLog
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.telemetry.request_recorder import RequestRecorder
from disagg_proxy.telemetry.timeseries import TimeSeries
from disagg_report.figures import percentile
from disagg_sim.step_model import EngineProfile

POLL_SECONDS = 1.0
"""Between two readings of the engines' /metrics."""

MAX_MODEL_LEN = 32_768


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds to the first token, and per token after it, that a good request takes at most."""

    ttft: float = 0.4
    tpot: float = 0.01


@dataclass(frozen=True, slots=True)
class Served:
    """One request.

    Attributes:
        at: when it was sent. ttft, tpot, longest: seconds; longest: of its longest gap.
        tokens, hits: prompt tokens, and those found in a prefix cache.
        way: ``split``, or the role of the engine that served it alone; "" for one that was refused.
    """

    at: float
    ttft: float = 0.0
    tpot: float = 0.0
    longest: float = 0.0
    tokens: int = 0
    hits: int = 0
    way: str = ""

    def good(self, slo: Slo) -> bool:
        """Whether it was answered within the SLO."""
        return bool(self.way) and self.ttft <= slo.ttft and self.tpot <= slo.tpot


class Trial:
    """Runs one arm under one workload.

    Args:
        paces: for each engine the seconds that it takes for each second of the profile; None: 1.
        changes: when the paces of ``paces`` begin to hold; 0: they always do.

    Attributes:
        served: requests, in the order of their ends. twice: prompts computed a second time.
    """

    def __init__(
        self, arm: Arm, profile: EngineProfile, seed: int, slo: Slo, paces: Many[float] | None = None,
        changes: float = 0.0,
    ) -> None:  # fmt: skip
        self.loop = VirtualLoop()
        self._arm = arm
        self._slo = slo
        self._alone = 0.0
        self.proxy = VirtualProxy(
            self.loop, {Role.PREFILL: arm.prefills, Role.DECODE: arm.decodes}, KIND, arm.policy, arm.policy,
            limits=Limits(queue=10**6, queue_timeout=60.0), seeds=[seed], max_model_len=MAX_MODEL_LEN,
        )  # fmt: skip
        self._recorder = RequestRecorder(self.proxy.stats, EventLog(), TimeSeries())
        self._recorder.learn_end = self._learn
        self._outputs = OutputEstimator()
        self.elastic = Elastic(self.proxy.registry, Goals(slo.ttft, slo.tpot))
        if arm.kind == "elastic":
            self.proxy.selections[0].set_chooser(self.elastic)
            self._recorder.learn_first_token = self.elastic.learn_first_token
        instances = [*self.proxy.instances[Role.PREFILL], *self.proxy.instances[Role.DECODE]]
        self.engines: dict[Instance, Engine] = {}
        for instance, pace in zip(instances, paces or [1.0] * len(instances), strict=True):
            engine = Engine(self.loop, profile, connector=arm.kind != "plain", pace=1.0 if changes else pace)
            self.engines[instance] = engine
            if changes:
                self.loop.call_at(changes, setattr, engine, "pace", pace)
        self.served: list[Served] = []
        self._open = 0
        self._end: asyncio.Future[None] = self.loop.create_future()

    @property
    def twice(self) -> int:
        """Prompts whose KV was dropped before decode fetched it, so that decode computed them again."""
        return sum(engine.twice for engine in self.engines.values())

    def run(self, sessions: list[Session]) -> None:
        """Serve all requests."""
        self.loop.run_alone(self._run(sessions))

    async def _run(self, sessions: list[Session]) -> None:
        self._open = len(sessions)
        if not sessions:
            return
        self._poll()
        for session in sessions:
            self.loop.call_at(session[0].at, self._ask, session, 0)
        await self._end

    def _poll(self) -> None:
        for instance, engine in self.engines.items():
            instance.engine_load = EngineLoad(
                self.loop.time(), engine.running, engine.waiting, engine.kv_usage, engine.profile.kv_cache_tokens
            )
        self.loop.call_later(POLL_SECONDS, self._poll)

    def _ask(self, session: Session, turn: int) -> None:
        self.loop.create_task(self._serve(session, turn))

    def _traits(self, ask: Ask) -> Traits:
        # Names of prefixes take most of the time, where no policy needs them.
        selection = self.proxy.selections[0]
        return traits_of(ask, ask.tokens) if selection.needs_prefix or selection.needs_session else Traits(ask.tokens)

    def _learn(self, record: RequestRecord) -> None:
        """A request has ended; as in disagg_proxy/services.py."""
        if record.outcome == "ok":
            self._outputs.observe(record.model, record.pieces)
            if self._arm.kind == "elastic":
                self.elastic.learn_end(record)

    async def _serve(self, session: Session, turn: int) -> None:
        ask, begun, arm = session[turn], self.loop.time(), self._arm
        preference = PlacementPreference.EITHER if arm.kind == "elastic" else PlacementPreference.PAIR
        self._alone += 1.0 if arm.kind == "plain" else arm.alone
        if self._alone >= 1.0:
            self._alone -= 1.0
            preference = PlacementPreference.ALONE
        record = self._recorder.open("/v1/completions", None)
        record.on_ready(MODEL)
        output = self._outputs.tokens(MODEL, ask.output)
        counts = arm.admits and arm.kind != "plain"
        wish = Wish(output, ask.tokens + output if counts else 0, record.arrived)
        demand = Demand(MODEL, preference, 0, self._traits(ask), wish=wish)
        try:
            placement = await self.proxy.queues[0].acquire(demand)
        except ProxyError as error:
            record.fail(error)
            record.end()
            self.served.append(Served(begun))
            self._next(session, turn)
            return
        self._submit(ask, placement, record, session, turn)

    def _submit(self, ask: Ask, placement: Placement, record: RequestRecord, session: Session, turn: int) -> None:
        """Send the legs of one request, and note what a connector notes (disagg_proxy/connectors/recomputing.py)."""
        answers = self.engines[placement.decode]
        sequence = Sequence(ask.blocks, ask.block, ask.tokens, ask.output)
        way = placement.decode.role.value
        giver: Sequence | None = None
        record.forecast = placement.forecast
        record.on_admitted()
        record.on_attempt(placement.prefill, placement.decode, "")

        def first_token() -> None:
            placement.release_kv()
            placement.computed()
            record.on_first_byte(True)

        def done() -> None:
            placement.decode_lease.end(failed=False)
            record.pieces = ask.output
            record.complete()
            record.end()
            now, first = self.loop.time(), record.first_byte
            assert first is not None
            tpot = (now - first) / (ask.output - 1) if ask.output > 1 else 0.0
            hits = sequence.hits if giver is None else giver.hits
            arrived = record.arrived
            self.served.append(Served(arrived, first - arrived, tpot, sequence.longest, ask.tokens, hits, way))
            self._next(session, turn)

        sequence.first_token, sequence.done = first_token, done
        if placement.prefill is not None:
            lease, way = placement.prefill_lease, "split"
            assert lease is not None

            def prefilled() -> None:
                lease.end(failed=False)
                record.on_prefill_response()
                placement.computed()

            giver = Sequence(ask.blocks, ask.block, ask.tokens, 1, done=prefilled)
            prefill = self.engines[placement.prefill]
            giver.transfer = sequence.transfer = Transfer(prefill, answers, ask.tokens, giver, sequence)
            record.on_prefill_sent()
            prefill.submit(giver)
        record.on_decode_sent()
        answers.submit(sequence)

    def _next(self, session: Session, turn: int) -> None:
        if turn + 1 < len(session):
            self.loop.call_later(session[turn + 1].at, self._ask, session, turn + 1)
            return
        self._open -= 1
        if not self._open:
            self._end.set_result(None)

    def figures(self, begin: float, end: float) -> dict[str, float]:
        """Figures of the requests that were sent from ``begin`` to ``end``; times in milliseconds."""
        rows = [row for row in self.served if begin <= row.at < end]
        answered = [row for row in rows if row.way]
        gaps = sorted(
            (seconds, count) for one in self.engines.values() for at, seconds, count in one.gaps if begin <= at < end
        )
        ways = {way: sum(row.way == way for row in rows) / len(rows) if rows else 0.0 for way in _WAYS}
        return {
            "requests": len(rows),
            "good": sum(row.good(self._slo) for row in rows) / len(rows) if rows else 0.0,
            "refused": 1 - len(answered) / len(rows) if rows else 0.0,
            "ttft_p50_ms": 1e3 * (percentile([row.ttft for row in answered], 0.5) or 0.0),
            "ttft_p99_ms": 1e3 * (percentile([row.ttft for row in answered], 0.99) or 0.0),
            "tpot_p50_ms": 1e3 * (percentile([row.tpot for row in answered if row.tpot], 0.5) or 0.0),
            "longest_gap_p99_ms": 1e3 * (percentile([row.longest for row in answered], 0.99) or 0.0),
            "gap_p99_ms": 1e3 * weighted_quantile(gaps, 0.99),
            "hits": sum(row.hits for row in rows) / max(1, sum(row.tokens for row in rows)),
            "twice": self.twice / max(1, len(self.served)),
            "preempted": sum(one.preempted for one in self.engines.values()) / max(1, len(self.served)),
            **{f"share_{way}": share for way, share in ways.items()},
        }


_WAYS = ("split", "prefill", "decode")
