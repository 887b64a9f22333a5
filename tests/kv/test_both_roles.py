"""Engines with ``kv_both``: two of them whose requests wait for each other never block each other.

The real scheduler half and the real state machines, under a stand-in for vLLM's scheduler (first come, first served;
a request that cannot be allocated stops those behind it; a finished one is freed).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from disagg_kv.decode.pending_loads import Load, PendingLoads
from disagg_kv.engine.announce import announcement
from disagg_kv.engine.groups import CacheGroup, CacheGroups
from disagg_kv.engine.scheduler import ConnectorScheduler
from disagg_kv.prefill.send_queue import Segment, SendQueue
from disagg_kv.prefill.server import Server
from disagg_kv.protocol.frames import Kind, decode_body
from disagg_kv.protocol.handshake import Identity
from disagg_kv.protocol.messages import Go, Gone
from disagg_kv.settings import Settings
from tests.kv.memory import SHAPE, Decode, key
from tests.kv.test_scheduler import Request, _blocks, _output

BLOCKS, BLOCK = 41, 4
GROUPS = CacheGroups((CacheGroup(BLOCK),))
ADDRESSES = ("127.0.0.1:21001", "127.0.0.1:21002")


@dataclass(eq=False)
class Engine:
    """One engine, its cache of 41 blocks, and the connection to the other one."""

    address: str
    half: ConnectorScheduler
    waiting: deque[Request] = field(default_factory=deque)
    running: dict[str, tuple[Request, int]] = field(default_factory=dict)
    loading: dict[str, Request] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)
    owned: dict[str, list[int]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    tokens_loaded: int = 0

    def __post_init__(self) -> None:
        self.free = list(range(BLOCKS))
        self.pending = PendingLoads()
        self.queue = SendQueue(1e9, hold_blocks=BLOCKS // 4)
        self.peer = self.queue.attach(lambda: None)

    def connect(self, other: Engine) -> None:
        self.other = other

    def schedule(self) -> dict[str, Any]:
        new = {}
        for request in list(self.waiting):
            external, _ = (0, False) if request.request_id in self.loaded else self.half.num_matched_tokens(request, 0)
            if external is None:
                continue
            needed = -(-request.num_prompt_tokens // BLOCK)
            if request.request_id not in self.loaded:
                if needed > len(self.free):
                    break
                ids = self.owned[request.request_id] = [self.free.pop() for _ in range(needed)]
                self.half.allocated(request, _blocks(*ids), external)
            self.waiting.remove(request)
            if external:
                self.loading[request.request_id] = request
                continue
            tokens = request.num_prompt_tokens
            new[request.request_id] = (self.owned[request.request_id], 0, tokens)
            self.running[request.request_id] = (request, 4 if self._decodes(request) else 1)
        return new

    @staticmethod
    def _decodes(request: Request) -> bool:
        return "from" in request.kv_transfer_params

    def step(self) -> bool:
        """Whether anything changed."""
        new = self.schedule()
        plan = self.half.plan(_output(new))
        for opening in plan.opens:
            self.queue.open(opening.key, opening.request, opening.total)
        for progress in plan.progress:
            self.queue.progress(progress.request, progress.blocks, progress.ready, None)
        for load in plan.loads:
            made = Load(load.key, load.request, load.blocks, load.first, time.monotonic() + 1e9, self.other.address)
            self.pending.start(made)
            self.other.queue.on_want(self.other.peer, made.want())
        for name, reason in plan.drops:
            self.queue.drop(name, reason)
        changed = bool(new or plan.loads or self.running)
        for name, (request, left) in list(self.running.items()):
            self.running[name] = (request, left - 1)
            if left == 1:
                del self.running[name]
                self.done.add(name)
                if not self.half.finished(request):
                    self.free += self.owned.pop(name)
                else:
                    self.queue.finish([name])
        return self.send() or changed

    def send(self) -> bool:
        """Whether the other engine got something, or blocks came free."""
        moved = False
        while (item := self.queue.next(self.peer, 0)) is not None:
            moved = True
            if isinstance(item, Segment):
                go = Go(item.key, item.first, len(item.blocks), item.last)
                load = self.other.pending.on_go(self.address, go)
                if load is not None:
                    self.other.pending.on_received(load, len(item.blocks), True)
                self.queue.on_sent(self.peer, item, True)
            else:
                kind, body = decode_body(item[4:])
                assert kind is Kind.GONE
                gone = Gone.decode(body)
                self.other.pending.on_gone(self.address, gone.key, gone.reason)
        sent = self.queue.collect()
        for name in sent:
            self.free += self.owned.pop(name)
        found = self.pending.collect()
        self.tokens_loaded += sum(self.loading[name].num_prompt_tokens for name in found.loaded)
        self.half.transfers_finished(set(sent), set(found.requests))
        for name in found.requests:
            self.loaded.add(name)
            self.waiting.appendleft(self.loading.pop(name))
        return moved or bool(sent or found.requests)


def _engines() -> tuple[Engine, Engine]:
    first, second = (Engine(a, ConnectorScheduler(True, GROUPS, Settings(), BLOCKS)) for a in ADDRESSES)
    first.connect(second)
    second.connect(first)
    return first, second


def _cross(engines: tuple[Engine, Engine], tokens: Any) -> None:
    """64 requests, 32 of which decode on each engine and prefill on the other; all decode legs come first."""
    for number in range(64):
        decode, prefill = engines[number % 2], engines[1 - number % 2]
        prompt = [number, *range(tokens(number) - 1)]
        decode.waiting.append(Request(f"d{number}", prompt, {"transfer_id": f"t{number}", "from": prefill.address}))
    for number in range(64):
        prompt = [number, *range(tokens(number) - 1)]
        engines[1 - number % 2].waiting.append(Request(f"p{number}", prompt, {"transfer_id": f"t{number}"}))


def _run(engines: tuple[Engine, Engine]) -> bool:
    """Whether all 128 legs end."""
    while engines[0].step() | engines[1].step():
        pass
    return sum(len(engine.done) for engine in engines) == 128


@pytest.mark.parametrize("tokens", [
    lambda number: 20, lambda number: 36, lambda number: 40, lambda number: 8 + number % 33, lambda number: 60,
], ids=["5 blocks", "9 blocks", "10 blocks", "mixed", "more than a quarter"])  # fmt: skip
def test_64_requests_that_cross_all_end(tokens: Any) -> None:
    engines = _engines()
    _cross(engines, tokens)
    assert _run(engines)
    for engine in engines:
        assert sorted(engine.free) == list(range(BLOCKS)) and not engine.owned, "no block is lost"
        assert engine.queue.counts()["wants"] == 0 and not engine.pending.waiting()
    loaded = sum(engine.tokens_loaded for engine in engines)
    assert loaded > 0 if tokens(0) <= 40 else loaded == 0


def test_without_the_limits_they_block_each_other() -> None:
    """The control: loads fill both caches, and no prompt that they wait for can be computed."""
    engines = _engines()
    for engine in engines:
        engine.half._both = 10**6
    _cross(engines, lambda number: 20)
    assert not _run(engines)
    assert all(len(engine.loading) == BLOCKS // 5 and not engine.running for engine in engines)


def test_a_request_is_offered_or_loaded_by_its_params() -> None:
    half = ConnectorScheduler(True, GROUPS, Settings(), BLOCKS)
    fetching = Request("d", list(range(20)), {"transfer_id": "t", "from": ADDRESSES[1]})
    offered = Request("p", list(range(20)), {"transfer_id": "u"})
    plain = Request("x", list(range(20)), None)
    found = [half.num_matched_tokens(one, 0) for one in (fetching, offered, plain)]
    assert found == [(20, True), (0, False), (0, False)]
    half.allocated(fetching, _blocks(1, 2, 3, 4, 5), 20)
    half.allocated(offered, _blocks(6, 7, 8, 9, 10), 0)
    half.allocated(plain, _blocks(11, 12, 13, 14, 15), 0)
    plan = half.plan(_output({"p": ([6, 7, 8, 9, 10], 0, 20), "x": ([11, 12, 13, 14, 15], 0, 20)}))
    assert [load.request for load in plan.loads] == ["d"] and [one.request for one in plan.opens] == ["p"]
    assert [half.finished(one) for one in (plain, offered, fetching)] == [False, True, False]
    assert half.plan(_output()).cancels == ["d"]


def test_both_roles_are_announced_beside_the_one_that_older_proxies_read() -> None:
    identity = Identity("decode", "b", 0, SHAPE)
    found = announcement(identity, "h:1", "k:1", ["tcp"], both=True)
    assert (found["type"], found["roles"]) == ("D", ["prefill", "decode"])
    assert "roles" not in announcement(identity, "h:1", "k:1", ["tcp"])


@pytest.fixture
def both(decode: Callable[..., Decode]) -> tuple[Decode, Decode]:
    """Two engines whose ports offer KV and whose connections load it."""

    def make(seed: int) -> Decode:
        engine = decode()
        engine.server.close()
        engine.cache.fill(range(8), seed)
        serving = replace(engine.context, identity=replace(engine.context.identity, role="prefill"))
        engine.queue = SendQueue(hold_seconds=60)
        engine.server = Server(serving, engine.queue, 0, engine.pending.release, engine.connections.connect)
        engine.address = f"127.0.0.1:{engine.server.port}"
        return engine

    return make(1), make(2)


def test_kv_goes_both_ways_at_once(both: tuple[Any, Any]) -> None:
    for number, (here, there) in enumerate((both, both[::-1])):
        there.queue.open(key(f"t{number}"), "p", 2)
        there.queue.progress("p", [0, 1], 2, None)
        here.load(key(f"t{number}"), there.address, [5, 6])
    for number, (here, there) in enumerate((both, both[::-1])):
        found = here.result()
        assert (found.requests, found.failed_blocks) == ({f"d-t{number}"}, frozenset())
        assert [rows[5:7] for rows in here.cache.rows] == [rows[:2] for rows in there.cache.rows]
