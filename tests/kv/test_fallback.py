"""A transport that fails to open is remembered for the pair, and the next one is tried: no request is lost to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from disagg_kv.decode import peer_connection
from disagg_kv.prefill import server
from disagg_kv.transport import fallback
from disagg_kv.transport.channel import Channel
from disagg_kv.transport.factory import RankContext
from disagg_kv.transport.place import Place
from tests.kv.memory import Decode, MemoryTransport, Prefill, key, until

WHY = "NCCL error: invalid usage"


class Pair:
    """Two engines on GPUs, between which NCCL can be made to fail.

    Attributes:
        opened: transports that decode tried, in order.
    """

    def __init__(self, prefill: Callable[..., Prefill], decode: Callable[..., Decode], **settings: Any) -> None:
        self.opened: list[str] = []
        self.open_nccl: Callable[[], None] = self.fail
        self.make_prefill = prefill
        self.p, self.d = prefill(settings=settings), decode(settings=settings)
        self.on_gpu(self.p.context)
        self.on_gpu(self.d.context)

    def on_gpu(self, context: RankContext) -> None:
        def factory(context: RankContext, channel: Channel, ready: Mapping[str, Any]) -> MemoryTransport:
            name = ready["transport"]
            if context.identity.role == "decode":
                self.opened.append(name)
            if name == "nccl":
                self.open_nccl()
            transport = MemoryTransport(context.cache, channel)  # type: ignore[arg-type]
            transport.name = name
            return transport

        context.cache.on_gpu = True
        context.transport_factory = factory
        context.place = Place(host=context.identity.role, gpu=f"GPU-{context.identity.role}")

    def fail(self) -> None:
        raise RuntimeError(WHY)

    def load(self, name: str) -> bool:
        """Whether decode got this prompt's KV."""
        self.p.compute(key(name), [1])
        self.d.load(key(name), self.p.address, [2])
        return not self.d.result().failed_blocks

    def drop_connection(self) -> None:
        self.p.server.disconnect()
        until(lambda: not self.d.connections.transports.running(), lambda: threading.Event().wait(0.01) and None)


@pytest.fixture
def make(prefill, decode, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pair]:
    monkeypatch.setattr(server, "offer_transport", lambda context, name, staging: {"transport": name, "staging": 64})
    return lambda **settings: Pair(prefill, decode, **settings)


def test_the_next_transport_is_tried_and_no_load_fails(make, caplog) -> None:
    pair = make()
    with caplog.at_level(logging.INFO, "vllm.disagg_kv"):
        assert pair.load("a")
        assert pair.opened == ["nccl", "tcp"]
        assert pair.d.connections.transports.running() == {
            pair.p.address: f"tcp; ipc not used: the engines are on different hosts; nccl failed: RuntimeError: {WHY}"
        }
        pair.drop_connection()
        assert pair.load("b")
    assert pair.opened == ["nccl", "tcp", "tcp"], "remembered"
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "failed to open" in r.getMessage()]
    assert len(warned) == 1 and WHY in warned[0]
    assert any("connected (tcp; nccl failed" in record.getMessage() for record in caplog.records), "prefill knows too"


def test_where_it_works_nothing_else_is_tried(make) -> None:
    pair = make()
    pair.open_nccl = lambda: None
    assert pair.load("a") and pair.opened == ["nccl"]
    assert pair.d.connections.transports.running() == {pair.p.address: "nccl"}


def test_another_process_at_the_address_gets_a_new_chance(make) -> None:
    pair = make()
    assert pair.load("a")
    pair.drop_connection()
    pair.open_nccl = lambda: None
    pair.p.context.identity = replace(pair.p.context.identity, boot="restarted")
    assert pair.load("b")
    assert pair.opened == ["nccl", "tcp", "nccl"]


def test_time_gives_a_new_chance(make, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make()
    assert pair.load("a")
    pair.drop_connection()
    pair.open_nccl = lambda: None
    monkeypatch.setattr(fallback, "FORGET_SECONDS", 0.0)
    assert pair.load("b") and pair.opened[-1] == "nccl"


def test_a_transport_that_is_required_is_not_replaced(make) -> None:
    pair = make(transport="nccl")
    assert not pair.load("a")
    assert set(pair.opened) == {"nccl"}


def test_a_transport_that_hangs_while_it_opens_is_not_offered_again(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits for a peer that has given up."""
    monkeypatch.setattr(peer_connection, "_OPEN_SECONDS", 0.3)
    pair, ended = make(), threading.Event()
    pair.open_nccl = lambda: ended.wait(20) and None
    assert not pair.load("a")
    assert pair.load("b") and pair.opened == ["nccl", "tcp"]
    before = threading.active_count()
    ended.set()
    until(lambda: threading.active_count() < before, lambda: threading.Event().wait(0.01) and None)
    running = pair.d.connections.transports.running()
    assert running[pair.p.address].startswith("tcp; "), "what opens too late changes nothing"


def test_all_failed_means_all_are_offered() -> None:
    memory = fallback.TransportMemory()
    for name in ("nccl", "tcp"):
        memory.failed("a", "boot", name, "why")
    assert memory.offer("a", ["nccl", "tcp"]) == (["nccl", "tcp"], {})
    assert memory.offer("b", ["nccl", "tcp"]) == (["nccl", "tcp"], {})
