"""One run: a workload on engines, every choice made by the proxy's own registry, pairing, gate, leases and policies."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from statistics import mean, median

from bench.policies.engines import CACHE, Decode, Job, Prefill
from bench.virtual.clock import VirtualLoop
from bench.virtual.proxy import MODEL, VirtualProxy
from bench.virtual.requests import Session, traits_of, weighted_quantile
from disagg_proxy.admission.queue import Demand, Limits
from disagg_proxy.cluster.choice import PlacementPreference
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.connectors.p2p_nccl import KIND as P2P


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
        # The balance of the work needs only the loads, which workers share; their limits and queues are one.
        proxy = VirtualProxy(
            self.loop, {Role.PREFILL: setup.prefills, Role.DECODE: setup.decodes}, P2P, setup.prefill, setup.decode,
            bound=setup.bound, limits=Limits(decode=256, queue=10**6, queue_timeout=1e6),
            seeds=[seed + worker for worker in range(setup.workers)],
        )  # fmt: skip
        self.registry, self.gates = proxy.registry, proxy.queues
        self.prefills: dict[Instance, Prefill] = {
            one: Prefill(self.loop, setup.cache) for one in proxy.instances[Role.PREFILL]
        }
        self.decodes: dict[Instance, Decode] = {one: Decode(self.loop) for one in proxy.instances[Role.DECODE]}
        self.rows: list[tuple[float, float, int, int]] = []
        """When asked, TTFT, prompt tokens, tokens found in the cache."""
        self._open = 0
        self._end: asyncio.Future[None] = self.loop.create_future()

    def run(self, sessions: list[Session]) -> None:
        self.loop.run_alone(self._run(sessions))

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
        traits = traits_of(ask, round(ask.tokens * factor))
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
            "itl_p99_ms": weighted_quantile(gaps, 0.99) * 1e3,
            "hit_rate": sum(row[3] for row in rows) / sum(row[2] for row in rows),
            "prefill_balance": max(work) / mean(work),
            "decode_balance": max(tokens) / mean(tokens),
            "prefill_busy": mean(work) / self.loop.time(),
        }
