"""ALLOW_REGISTER=proven: an engine counts once it proves the secret, and a forged announcement displaces nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgpack
import pytest
import zmq
import zmq.asyncio

from disagg_kv.control import Control
from disagg_proxy.cluster.instance import State
from disagg_proxy.discovery import proof
from disagg_sim import SimEngine
from tests.conftest import Proxy, running_proxy, soon
from tests.simulated import Machine

PROVEN = pytest.mark.settings(allow_register=("proven",), kv_secret="s", connect_timeout=30.0)
OWN: dict[str, Any] = {"connector": "disagg_kv", "kv_secret": "s"}


def announced(engine: SimEngine) -> dict[str, Any]:
    return dict(engine._pinger.fields())


def dropped(proxy: Proxy) -> dict[str, int]:
    return dict(proxy.services.discovery.listener.traffic.dropped)


async def counted(proxy: Proxy, kind: str) -> None:
    """Return when a message of this kind was dropped; the listener's thread notifies nobody."""
    while not dropped(proxy).get(kind):
        await asyncio.sleep(0.02)


class Forger:
    """Sends announcements of its own to the proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"tcp://{proxy.zmq}")

    async def until(self, condition: Callable[[], bool], fields: dict[str, Any]) -> None:
        """Send the announcement again and again until the condition is met."""
        message = msgpack.packb(fields)
        while not condition():
            await self._socket.send(message)
            await asyncio.sleep(0.02)

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
async def forger(machine: Machine) -> AsyncIterator[Forger]:
    forger = Forger(machine.proxy)
    yield forger
    forger.close()


@PROVEN
async def test_engines_that_prove_the_secret_serve(machine: Machine) -> None:
    await machine.engine("prefill", **OWN)
    await machine.engine("decode", **OWN)
    await soon(machine.proxy.until_pairs())
    await machine.check_right()
    assert dropped(machine.proxy) == {}


@PROVEN
async def test_one_handshake_proves_all_later_pings(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = Control.open

    async def noted(address: str, secret: str = "", seconds: float = 5.0) -> Control:
        opened.append(address)
        return await real(address, secret, seconds)

    monkeypatch.setattr(proof.Control, "open", noted)
    engine = await machine.engine("prefill", **OWN)
    await soon(machine.proxy.until_state(engine.http_address, State.READY))
    pings = engine.state()["pings"]
    await soon(engine.wait_until(lambda state: state["pings"] >= pings + 3))
    read = machine.proxy.services.discovery.listener.traffic
    while read.messages < pings + 2:
        await asyncio.sleep(0.01)
    assert opened == [engine.kv_address]


@pytest.mark.parametrize("secret", ["", "other"])
@PROVEN
async def test_another_secret_registers_nothing(
    machine: Machine, caplog: pytest.LogCaptureFixture, secret: str
) -> None:
    engine = await machine.engine("prefill", **{**OWN, "kv_secret": secret})
    await soon(counted(machine.proxy, "unproven"))
    assert not machine.proxy.knows(engine.http_address)
    said = [record.getMessage() for record in caplog.records if "unproven" in record.getMessage()]
    assert said == [
        f"Dropped an unproven registration from 127.0.0.1: {engine.kv_address} does not prove it: "
        "the shared secret differs"
    ]


@PROVEN
async def test_engines_of_other_protocols_register_by_address_only(machine: Machine) -> None:
    await machine.engine("prefill")
    await soon(counted(machine.proxy, "forbidden"))
    assert not machine.proxy.services.registry.instances()


@pytest.mark.parametrize(
    "change",
    [{"http_address": "127.0.0.1:1"}, {"type": "D"}, {"boot_id": "b" * 32}, {"block_size": 999}, {"more": 1}],
    ids=lambda change: next(iter(change)),
)
@PROVEN
async def test_what_the_engine_does_not_send_is_not_proven(
    machine: Machine, forger: Forger, change: dict[str, Any]
) -> None:
    """With the engine's own KV address, whose handshake is right."""
    engine = await machine.engine("prefill", **OWN)
    await soon(machine.proxy.until_state(engine.http_address, State.READY))
    kind = machine.proxy.instance(engine.http_address).kind
    await soon(forger.until(lambda: bool(dropped(machine.proxy).get("unproven")), {**announced(engine), **change}))
    (instance,) = machine.proxy.services.registry.instances()
    assert (instance.http.text, instance.state, instance.kind) == (engine.http_address, State.READY, kind)


@PROVEN
async def test_a_port_that_relays_the_handshake_proves_nothing(machine: Machine, forger: Forger) -> None:
    """KV would go through it: the KV address is a part of what is proven."""
    engine = await machine.engine("prefill", **OWN)
    await soon(machine.proxy.until_state(engine.http_address, State.READY))
    host, port = engine.kv_address.rsplit(":", 1)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there = await asyncio.open_connection(host, int(port))

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                target.write(data)
            target.close()

        await asyncio.gather(copy(reader, there), copy(there_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        forged = {**announced(engine), "zmq_address": address}
        await soon(forger.until(lambda: bool(dropped(machine.proxy).get("unproven")), forged))
        assert str(machine.proxy.instance(engine.http_address).kv.text) == engine.kv_address
    finally:
        server.close()


@PROVEN
async def test_what_unknown_senders_cause_is_bounded(machine: Machine, forger: Forger) -> None:
    """Ports that never answer: so many handshakes of one sender at a time, and engines of other senders go on."""
    connections = 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    fields = {"type": "P", "protocol": "disagg_kv", "boot_id": "b", "transports": ["tcp"], "kv_model": "m"}
    fields |= {"protocol_version": 1, "connector_version": "1", "tp": 1, "layout": "x", "dtype": "f", "block_size": 1}
    fields |= {"block_bytes": 1, "zmq_address": f"127.0.0.1:{port}"}
    try:
        numbers = iter(range(1, 60000))
        for _ in range(100):
            forged = {**fields, "http_address": f"127.0.0.1:{next(numbers)}"}
            await forger._socket.send(msgpack.packb(forged))
        messages = machine.proxy.services.discovery.listener.traffic
        while messages.messages < 100 or connections < proof.MAX_HANDSHAKES_OF_SENDER:
            await asyncio.sleep(0.02)
        proofs = machine.proxy.services.discovery._proofs
        assert len(proofs._running) == proof.MAX_HANDSHAKES_OF_SENDER == connections
        assert not machine.proxy.services.registry.instances()
    finally:
        server.close()


async def test_a_reload_may_permit_proven_engines() -> None:
    async with running_proxy(allow_register=("203.0.113.9", "proven"), kv_secret="s") as proxy:
        assert proxy.services.discovery.listener.allow.proven
