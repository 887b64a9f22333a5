"""Whatever arrives at the registration port is counted, said once per sender, and dropped; a real ping still works."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import msgpack
import pytest
import zmq
import zmq.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disagg_proxy.discovery.allow import AllowList
from disagg_proxy.discovery.announcement import MAX_BYTES
from disagg_proxy.discovery.listener import Listener
from tests.conftest import Proxy, running_proxy, soon

GOOD = {"type": "P", "http_address": "127.0.0.1:8100", "zmq_address": "127.0.0.1:21001"}


class Pinger:
    """A DEALER of the test's own, towards one proxy."""

    def __init__(self, proxy: Proxy, identity: bytes | None = None, port: int = 1) -> None:
        self._proxy = proxy
        self._context = zmq.asyncio.Context()
        self._port = port
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if identity is not None:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(f"tcp://{proxy.zmq}")

    async def send(self, *frames: bytes) -> None:
        await soon(self.socket.send_multipart(frames))

    async def until_read(self) -> None:
        """Return when all that was sent before has been read: a good ping behind it is known."""
        self._port += 1
        address = f"127.0.0.1:{self._port}"
        await self.send(msgpack.packb({**GOOD, "http_address": address, "zmq_address": f"127.0.0.2:{self._port}"}))
        await soon(self._proxy.until(lambda: self._proxy.knows(address)))

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
async def pinger(machine) -> AsyncIterator[Pinger]:
    pinger = Pinger(machine.proxy)
    yield pinger
    pinger.close()


def dropped(proxy: Proxy) -> dict[str, int]:
    return dict(proxy.services.discovery.listener.traffic.dropped)


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        ([b""], "malformed"),
        ([b"\xc1"], "malformed"),
        ([b"hello"], "malformed"),
        ([msgpack.packb(GOOD)[:-1]], "malformed"),
        ([msgpack.packb(GOOD) + b"\x00"], "malformed"),
        ([b"\x91" * 3000], "malformed"),
        ([b"a", msgpack.packb(GOOD)], "malformed"),
        ([b"", msgpack.packb(GOOD), b""], "malformed"),
        ([msgpack.packb({**GOOD, "extra": "x" * MAX_BYTES})], "oversized"),
        ([b"x" * 500_000], "oversized"),
        ([b"x"] * 5000, "oversized"),
        ([msgpack.packb([1, 2])], "mistyped"),
        ([msgpack.packb(None)], "mistyped"),
        ([msgpack.packb({})], "mistyped"),
        ([msgpack.packb({**GOOD, "type": "X"})], "mistyped"),
        ([msgpack.packb({**GOOD, "type": ["P"]})], "mistyped"),
        ([msgpack.packb({**GOOD, "type": b"P"})], "mistyped"),
        ([msgpack.packb({**GOOD, "http_address": 8100})], "mistyped"),
        ([msgpack.packb({**GOOD, "http_address": "127.0.0.1"})], "mistyped"),
        ([msgpack.packb({**GOOD, "http_address": "127.0.0.1:0"})], "mistyped"),
        ([msgpack.packb({**GOOD, "http_address": "127.0.0.1:99999"})], "mistyped"),
        ([msgpack.packb({**GOOD, "http_address": "a b:1"})], "mistyped"),
        ([msgpack.packb({**GOOD, "http_address": "evil/path:1"})], "mistyped"),
        ([msgpack.packb({**GOOD, "http_address": "user@127.0.0.1:1"})], "mistyped"),
        ([msgpack.packb({**GOOD, "zmq_address": "127.0.0.1___decode_addr_10.0.0.1:1"})], "mistyped"),
        ([msgpack.packb({**GOOD, "http_address": "203.0.113.7:8100"})], "forbidden"),
        ([msgpack.packb({**GOOD, "zmq_address": "203.0.113.7:21001"})], "forbidden"),
        ([msgpack.packb({**GOOD, "http_address": "metadata.example:80"})], "forbidden"),
        ([msgpack.packb({**GOOD, "http_address": "0.0.0.0:80"})], "forbidden"),
        ([msgpack.packb({**GOOD, "http_address": "[2001:db8::1]:80"})], "forbidden"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_message_is_counted_by_kind_and_dropped(machine, pinger: Pinger, frames, kind: str) -> None:
    await pinger.send(*frames)
    await pinger.until_read()
    assert dropped(machine.proxy) == {kind: 1}
    assert (await machine.get("/stats"))[1]["discovery"]["dropped"] == {kind: 1}
    assert len(machine.proxy.services.registry.instances()) == 1, "only the good ping behind it"


async def test_a_sender_is_blamed_once_for_each_kind(machine, pinger: Pinger, caplog) -> None:
    for _ in range(20):
        await pinger.send(b"hello")
        await pinger.send(msgpack.packb({}))
    await pinger.until_read()
    assert dropped(machine.proxy) == {"malformed": 20, "mistyped": 20}
    said = [record.getMessage() for record in caplog.records if "Dropped" in record.getMessage()]
    assert said == [
        "Dropped a malformed registration from 127.0.0.1: not msgpack: ExtraData",
        "Dropped a mistyped registration from 127.0.0.1: type is neither P nor D",
    ]


class Said(logging.Handler):
    """Tells the event loop that the listener's thread, which tells nobody else, has logged something."""

    def __init__(self) -> None:
        super().__init__()
        self.event = asyncio.Event()
        self.messages: list[str] = []
        self._loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self._loop.call_soon_threadsafe(self.event.set)


@pytest.mark.settings(allow_register=("10.0.0.0/8",))
async def test_a_forbidden_source_is_dropped_whatever_it_announces(machine, pinger: Pinger) -> None:
    said = Said()
    logging.getLogger("disagg_proxy.discovery.listener").addHandler(said)
    try:
        await pinger.send(msgpack.packb({**GOOD, "http_address": "10.1.2.3:1", "zmq_address": "10.1.2.3:2"}))
        await soon(said.event.wait())
    finally:
        logging.getLogger("disagg_proxy.discovery.listener").removeHandler(said)
    assert said.messages == [
        "Dropped a forbidden registration from 127.0.0.1: 127.0.0.1 may not register (ALLOW_REGISTER)"
    ]
    assert dropped(machine.proxy) == {"forbidden": 1}
    assert not machine.proxy.services.registry.instances()


@pytest.mark.settings(allow_register=("any",))
async def test_with_any_every_address_may_register(machine, pinger: Pinger) -> None:
    await pinger.send(msgpack.packb({**GOOD, "http_address": "203.0.113.7:8100", "zmq_address": "203.0.113.7:1"}))
    await pinger.until_read()
    assert not dropped(machine.proxy) and machine.proxy.knows("203.0.113.7:8100")


async def test_a_message_too_long_for_the_wire_costs_its_sender_the_connection(machine, pinger: Pinger) -> None:
    await pinger.send(b"x" * 2_000_000)
    other = Pinger(machine.proxy)
    try:
        await other.until_read()
    finally:
        other.close()
    assert machine.proxy.services.discovery.listener.traffic.messages == 1


async def test_a_flood_of_invented_instances_is_bounded_and_real_ones_still_serve(machine, pair, pinger) -> None:
    for number in range(1100):
        address = f"127.0.{number % 250 + 1}.9:{number // 250 + 1}"
        await pinger.send(
            msgpack.packb({**GOOD, "http_address": address, "zmq_address": address.replace(".9:", ".8:")})
        )
    await soon(machine.proxy.until(lambda: len(machine.proxy.services.registry.instances()) >= 1024))
    assert len(machine.proxy.services.registry.instances()) == 1024
    assert (await machine.post("/v1/completions", {"model": "sim-model", "prompt": "a b", "max_tokens": 1}))[0] == 200


async def test_bytes_that_are_no_zmq_at_all_do_no_harm(machine, pinger: Pinger) -> None:
    host, _, port = machine.proxy.zmq.rpartition(":")
    for junk in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\xff" + b"\0" * 8 + b"\x7f" + b"\x03" * 60, b"\0" * 100):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(junk)
        with contextlib.suppress(OSError):
            writer.write_eof()
            await soon(reader.read())
        writer.close()
    await pinger.until_read()
    assert not dropped(machine.proxy)


async def test_a_stolen_identity_silences_neither_its_owner_nor_the_next() -> None:
    async with running_proxy() as proxy:
        first, second = (Pinger(proxy, b"127.0.0.1:21001", port) for port in (100, 200))
        for pinger in (first, second, first, second):
            await pinger.until_read()
        first.close()
        third = Pinger(proxy, b"127.0.0.1:21001", 300)
        for pinger in (third, second):
            await pinger.until_read()
            pinger.close()


def test_half_open_peers_are_found_by_tcp() -> None:
    # ZMQ's heartbeats end the whole process where a peer that is not read from goes away (libzmq 4.3.5).
    listener = Listener("127.0.0.1", 0, AllowList(("local",)), lambda announcements: None)
    try:
        options = (zmq.HEARTBEAT_IVL, zmq.TCP_KEEPALIVE, zmq.TCP_KEEPALIVE_IDLE, zmq.TCP_KEEPALIVE_CNT)
        assert [listener._socket.getsockopt(option) for option in options] == [0, 1, 3, 3]
    finally:
        listener.stop()


# Random messages, most of them near misses of a real one.
TEXT = st.text(max_size=40) | st.sampled_from(["P", "D", "127.0.0.1:1", ":", "::1:80", "[::1]:80", "localhost:9"])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXT | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
NEAR = st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, VALUE)).map(msgpack.packb)
MESSAGE = st.lists(st.binary(max_size=200) | VALUE.map(msgpack.packb) | NEAR, min_size=1, max_size=3)


async def test_random_messages_never_end_the_listener(machine, pinger: Pinger) -> None:
    messages: list[list[bytes]] = []

    @settings(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(MESSAGE)
    def collect(frames: list[bytes]) -> None:
        messages.append(frames)

    collect()
    for frames in messages:
        await pinger.send(*frames)
    await pinger.until_read()
    traffic = machine.proxy.services.discovery.listener.traffic
    assert traffic.messages == len(messages) + 1 and "failed" not in traffic.dropped
    assert sum(traffic.dropped.values()) > 200


async def test_a_sender_that_vanishes_in_the_middle_of_a_message_does_no_harm() -> None:
    async with running_proxy() as proxy:
        for _ in range(20):
            gone = Pinger(proxy)
            await gone.send(b"x" * 400_000)
            gone.close()
        pinger = Pinger(proxy)
        await pinger.until_read()
        pinger.close()


async def test_a_ping_that_contradicts_a_live_instance_does_not_displace_it(machine, pair, pinger: Pinger) -> None:
    prefill, decode = pair
    claims = [
        {"type": "D", "http_address": prefill.http_address, "zmq_address": prefill.kv_address},
        {"type": "P", "http_address": prefill.http_address, "zmq_address": "127.0.0.1:1"},
        {"type": "D", "http_address": "127.0.0.1:999", "zmq_address": decode.kv_address},
    ]
    for claim in claims:
        await pinger.send(msgpack.packb(claim))
    await pinger.until_read()
    assert not machine.proxy.knows("127.0.0.1:999")
    assert machine.proxy.services.selection.ready_pairs() == 1
    refused = (await machine.get("/stats"))[1]["discovery"]["refused"]
    assert refused == {prefill.http_address: 2, "127.0.0.1:999": 1}
    await machine.check_right()
