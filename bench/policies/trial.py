"""One run: a workload on engines, every choice made by the proxy's own registry, pairing, gate, leases and policies."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from statistics import mean, median

from bench.policies.clock import VirtualLoop
from bench.policies.engines import CACHE, Decode, Job, Prefill
from bench.policies.workloads import Ask, Session
from disagg_proxy.address import parse_address
from disagg_proxy.admission.queue import AdmissionQueue, Demand, Limits
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.policies import DECODE_POLICIES, PREFILL_POLICIES, Traits
from disagg_proxy.cluster.policies.table import PrefixTable
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.selection import PlacementPreference, Selection
from disagg_proxy.connectors.p2p_nccl import KIND as P2P
from disagg_proxy.openai.prefix_hash import ENDS
from disagg_proxy.telemetry.stats import Stats

MODEL = "m"
_BYTES = 4
"""Of text, for a token."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is tried.

    Attributes:
        workers: proxy processes that share loads, but not what they know of prefixes; sessions go to any of them.
        guess: the proxy's estimate of a prompt's length is off by a factor of up to so much.
    """

    prefill: str
    decode: str
    prefills: int = 4
    decodes: int = 4
    bound: float = 2.0
    workers: int = 1
    cache: int = CACHE
    guess: float = 1.2


class Trial:
    """Runs one setup under one workload."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.loop = VirtualLoop()
        self.setup = setup
        self._rng = random.Random(f"trial {seed}")
        self.registry = Registry(self.loop.time, expiry=1e9)
        self.prefills: dict[Instance, Prefill] = {}
        self.decodes: dict[Instance, Decode] = {}
        for role, count, first in ((Role.PREFILL, setup.prefills, 20000), (Role.DECODE, setup.decodes, 30000)):
            for port in range(first, first + count):
                http, kv = (parse_address(f"127.0.0.1:{number}") for number in (port, port + 1000))
                self.registry.announce(role, http, kv, P2P)
        for instance in self.registry.instances():
            self.registry.admit(instance, {MODEL: {}})
            if instance.role is Role.PREFILL:
                self.prefills[instance] = Prefill(self.loop, setup.cache)
            else:
                self.decodes[instance] = Decode(self.loop)
        # The balance of the work needs only the loads, which workers share; their limits and queues are one.
        self.gates = [self._admission_queue(seed + worker) for worker in range(setup.workers)]
        self.rows: list[tuple[float, float, int, int]] = []
        """When asked, TTFT, prompt tokens, tokens found in the cache."""
        self._open = 0
        self._end: asyncio.Future[None] = self.loop.create_future()

    def _admission_queue(self, seed: int) -> AdmissionQueue:
        setup = self.setup
        selection = Selection(
            self.registry, PREFILL_POLICIES[setup.prefill], DECODE_POLICIES[setup.decode], table=PrefixTable(ENDS),
            bound=setup.bound, random=random.Random(seed).random,
        )  # fmt: skip
        limits = Limits(decode=256, queue=10**6, queue_timeout=1e6)
        return AdmissionQueue(selection, self.registry, limits, Stats(self.loop.time))

    def run(self, sessions: list[Session]) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._run(sessions))
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()

    async def _run(self, sessions: list[Session]) -> None:
        self._open = len(sessions)
        for session in sessions:
            self.loop.call_at(session[0].at, self._ask, session, 0)
        await self._end

    def _ask(self, session: Session, turn: int) -> None:
        self.loop.create_task(self._serve(session, turn))

    async def _serve(self, session: Session, turn: int) -> None:
        ask = session[turn]
        begun = self.loop.time()
        factor = self._rng.uniform(1 / self.setup.guess, self.setup.guess)
        traits = _traits(ask, round(ask.tokens * factor))
        size = traits.tokens
        admission_queue = self.gates[self._rng.randrange(len(self.gates))]
        placement = await admission_queue.acquire(Demand(MODEL, PlacementPreference.PAIR, size, traits))
        lease = placement.prefill_lease
        assert lease is not None
        self.registry.kv_compatibility.record_send(lease.instance, placement.decode)
        prefill, decode = self.prefills[lease.instance], self.decodes[placement.decode]
        job = Job(ask.blocks, ask.block, ask.tokens, ask.output)

        def prefilled() -> None:
            lease.end(failed=False)
            prefill.send(job, decode)

        def first_token() -> None:
            placement.release_kv()
            self.rows.append((begun, self.loop.time() - begun, job.tokens, job.hits))

        def done() -> None:
            placement.decode_lease.end(failed=False)
            if turn + 1 < len(session):
                self.loop.call_later(session[turn + 1].at, self._ask, session, turn + 1)
                return
            self._open -= 1
            if not self._open:
                self._end.set_result(None)

        job.done_prefill, job.first_token, job.done = prefilled, first_token, done
        prefill.submit(job)

    def figures(self, warm_up: float) -> dict[str, float]:
        """What came of it, of requests that were asked after ``warm_up`` seconds; times in milliseconds."""
        rows = [row for row in self.rows if row[0] >= warm_up]
        ttft = sorted(row[1] for row in rows)
        early = sorted(row[1] for row in self.rows if row[0] < warm_up) or [0.0]
        steps = [gap for decode in self.decodes.values() for gap in decode.gaps]
        gaps = sorted((seconds, count) for at, seconds, count in steps if at >= warm_up)
        work = [prefill.busy for prefill in self.prefills.values()]
        tokens = [decode.tokens for decode in self.decodes.values()]
        return {
            "requests": len(rows),
            "ttft_p50_ms": median(ttft) * 1e3,
            "ttft_p99_ms": ttft[int(len(ttft) * 0.99)] * 1e3,
            "ttft_mean_ms": mean(ttft) * 1e3,
            "first_ttft_p99_ms": early[int(len(early) * 0.99)] * 1e3,
            "itl_p99_ms": _weighted(gaps, 0.99) * 1e3,
            "hit_rate": sum(row[3] for row in rows) / sum(row[2] for row in rows),
            "prefill_balance": max(work) / mean(work),
            "decode_balance": max(tokens) / mean(tokens),
            "prefill_busy": mean(work) / self.loop.time(),
        }


def _traits(ask: Ask, tokens: int) -> Traits:
    names = []
    name, start = 0, 0
    per = ask.block * _BYTES
    size = ask.tokens * _BYTES
    for depth, end in enumerate(ENDS):
        if end > size:
            break
        stop = -(-end // per)
        name = hash((name, ask.blocks[start:stop])) & 0xFFFFFFFFFFFF
        names.append(name << 8 | depth)
        start = stop
    home = hash(ask.blocks[: ask.home]) & 0xFFFFFFFF
    # Here every client names its session.
    return Traits(tokens, tuple(names), size, home, ask.session)


def _weighted(values: list[tuple[float, int]], share: float) -> float:
    """Quantile of sorted (value, weight) pairs."""
    left = share * sum(count for _, count in values)
    for value, count in values:
        left -= count
        if left <= 0:
            return value
    return values[-1][0] if values else 0.0
