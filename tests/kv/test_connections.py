"""Real connections on loopback between the two halves: handshakes, transfers, ends, and hostile peers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disagg_kv.control import Control
from disagg_kv.decode.liveness import PROBES, Liveness
from disagg_kv.decode.pending_loads import Load
from disagg_kv.protocol.frames import Kind, encode
from disagg_kv.protocol.handshake import Refused, Shape, nonce
from disagg_kv.protocol.proven import CHANGING, check_announced
from disagg_kv.transport.channel import Channel
from tests.conftest import soon
from tests.kv.memory import SHAPE, Decode, MemoryTransport, Prefill, key, until
from tests.ports import hold_port

Make = Callable[..., Any]
MODERN = replace(SHAPE, digest="a" * 32)
"""Of an engine that announces a digest; ``SHAPE`` is of a release before that."""


def _wait(condition: Callable[[], bool]) -> None:
    until(condition, lambda: threading.Event().wait(0.01) and None)


def test_blocks_move(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    p.compute(key("t"), [3, 1, 4], seed=7)
    d.load(key("t"), p.address, [10, 11, 12])
    assert not d.result().failed_blocks
    assert d.cache.content([10, 11, 12]) == p.cache.content([3, 1, 4])


def test_only_what_is_missing_moves(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    p.compute(key("t"), [3, 1, 4, 5], seed=7)
    d.load(key("t"), p.address, [10, 11], first=2)
    assert not d.result().failed_blocks
    assert d.cache.content([10, 11]) == p.cache.content([4, 5])
    assert d.cache.content([0]) == [[bytes(8)]] * 3


def test_wanted_before_computed_and_many_chunks(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    blocks = list(range(40))
    d.load(key("t"), p.address, blocks)
    p.cache.fill(blocks, 3)
    p.send_queue.open(key("t"), "r", 40)
    p.send_queue.progress("r", blocks, 15, None)
    p.send_queue.progress("r", blocks, 40, None)
    assert not d.result().failed_blocks
    assert d.cache.content(blocks) == p.cache.content(blocks)


def test_blocks_are_read_behind_their_fence(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    passed = threading.Event()
    p.send_queue.open(key("t"), "r", 1)
    p.send_queue.progress("r", [2], 1, lambda: passed.wait(60))
    d.load(key("t"), p.address, [9])
    d.pending.wait(0.05)
    assert d.pending.waiting() == 1
    p.cache.fill([2], 5)
    passed.set()
    assert not d.result().failed_blocks
    assert d.cache.content([9]) == p.cache.content([2])


def test_a_prompt_with_tails_of_which_decode_has_a_part(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    blocks = [1, 2, 3, 11, 12, 13, 21]
    load = Load(key("t"), "d", [30, 31, 40, 41, 50], 1, time.monotonic() + 30, tails=(2, 1))
    d.connections.start(load, p.address)
    p.cache.fill(blocks, 5)
    p.send_queue.open(key("t"), "r", 7, "", (3, 1))
    for ready in (1, 2, 7):
        p.send_queue.progress("r", blocks[:ready], ready, None)
    assert not d.result().failed_blocks
    assert d.cache.content([30, 31, 40, 41, 50]) == p.cache.content([2, 3, 12, 13, 21])


def test_many_transfers_over_one_connection(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    for number in range(30):
        p.compute(key(f"t{number}"), [number], seed=number)
        d.load(key(f"t{number}"), p.address, [63 - number])
    assert not d.result(30).failed_blocks
    for number in range(30):
        assert d.cache.content([63 - number]) == p.cache.content([number])
    assert p.server.connections() == 1


def test_connection_refused(decode: Make) -> None:
    d = decode()
    with ExitStack() as hold:
        d.load(key("t"), f"127.0.0.1:{hold_port(hold)}", [1, 2])
        assert d.result().failed_blocks == {1, 2}


def test_prefill_dies_while_decode_waits(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    d.load(key("t"), p.address, [1, 2])
    _wait(lambda: p.send_queue.counts()["wants"] == 1)
    p.server.close()
    assert d.result().failed_blocks == {1, 2}


def test_a_restarted_prefill_is_connected_anew(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    p.compute(key("a"), [1])
    d.load(key("a"), p.address, [1])
    d.result()
    p.server.close()
    _wait(lambda: not next(iter(d.connections._connections.values())).usable)
    again = prefill(port=p.server.port)
    again.compute(key("b"), [2], seed=9)
    d.load(key("b"), p.address, [2])
    assert not d.result().failed_blocks
    assert d.cache.content([2]) == again.cache.content([2])


def test_decode_dies_and_prefill_drops_its_wants(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    d.load(key("t"), p.address, [1])
    _wait(lambda: p.send_queue.counts()["wants"] == 1)
    d.connections.close()
    _wait(lambda: p.send_queue.counts() == {"jobs": 0, "requests": 0, "wants": 0, "peers": 0})
    _wait(lambda: p.server.connections() == 0)


def test_a_late_load_is_given_up_and_released_on_prefill(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    d.load(key("t"), p.address, [1], seconds=0.05)
    assert d.result().failed_blocks == {1}
    _wait(lambda: p.send_queue.counts()["wants"] == 0)
    p.compute(key("u"), [5])
    d.load(key("u"), p.address, [1])
    assert not d.result().failed_blocks


def test_200_abandoned_requests_leave_nothing(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    for number in range(200):
        d.load(key(f"t{number}"), p.address, [number % 64])
        d.pending.cancel(f"d-t{number}")
    assert len(d.result(200).requests) == 200
    assert d.pending.waiting() == 0
    p.compute(key("last"), [5])
    d.load(key("last"), p.address, [1])
    assert not d.result().failed_blocks
    _wait(lambda: p.send_queue.counts()["wants"] == 0)


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        (Shape(**{**SHAPE.__dict__, "tp": 2}), "tp is 1, on decode 2"),
        (Shape(**{**SHAPE.__dict__, "dtype": "bfloat16"}), "dtype is float32, on decode bfloat16"),
        (Shape(**{**SHAPE.__dict__, "model": "other"}), "model is m, on decode other"),
        (Shape(**{**SHAPE.__dict__, "layout": "x"}), "layout is (B*1,4), on decode x"),
        (
            replace(MODERN, digest="b" * 32),
            f"model is m@{'a' * 12}, on decode m@{'b' * 12} (other weights or configuration)",
        ),
    ],
)
def test_caches_that_do_not_fit_are_refused(
    prefill: Make, decode: Make, shape: Shape, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    p, d = prefill(shape=MODERN if shape.digest else SHAPE), decode(shape=shape)
    with caplog.at_level(logging.INFO, "vllm.disagg_kv"):
        d.load(key("t"), p.address, [1])
        assert d.result().failed_blocks == {1}
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(logged) == 2 and all(word in text for text in logged), "one line of each side, in the same words"


@pytest.mark.parametrize("computed_first", [True, False])
@pytest.mark.parametrize(("here", "there", "fit"), [("x", "x", True), ("x", "y", False), ("x", "", False)])
def test_prompts_of_other_adapters_are_refused_at_once(
    prefill: Make, decode: Make, here: str, there: str, fit: bool, computed_first: bool
) -> None:
    """The key names the adapter only: of another content under that name nothing is taken, and nothing waits."""
    p, d = prefill(shape=MODERN), decode(shape=MODERN)
    if computed_first:
        p.compute(key("t"), [3], adapter=here)
    d.load(key("t"), p.address, [10], adapter=there)
    if not computed_first:
        _wait(lambda: p.send_queue.counts()["wants"] == 1)
        p.compute(key("t"), [3], adapter=here)
    assert d.result().failed_blocks == (set() if fit else {10})


@pytest.mark.parametrize("connected", [True, False])
def test_adapters_are_not_loaded_from_releases_that_do_not_compare_them(
    prefill: Make, decode: Make, connected: bool
) -> None:
    p, d = prefill(shape=SHAPE), decode(shape=MODERN)
    if connected:
        p.compute(key("plain"), [1])
        d.load(key("plain"), p.address, [1])
        assert not d.result().failed_blocks
    d.load(key("t"), p.address, [2], adapter="x")
    assert d.result().failed_blocks == {2}
    p.compute(key("again"), [1])
    d.load(key("again"), p.address, [1])
    assert not d.result().failed_blocks, "other prompts are still loaded"


@pytest.mark.parametrize("release", [MODERN, SHAPE])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engine_with_updated_weights_is_refused(prefill: Make, decode: Make, role: str, release: Shape) -> None:
    """By engines of every release, and also by one that was connected."""
    p, d = prefill(shape=MODERN), decode(shape=MODERN)
    updated, other = (p, d) if role == "prefill" else (d, p)
    other.context.identity = replace(other.context.identity, shape=release)
    p.compute(key("a"), [1])
    d.load(key("a"), p.address, [1])
    assert not d.result().failed_blocks
    before = updated.context.identity
    updated.context.renew()
    d.connections.close()
    p.server.disconnect()
    after = updated.context.identity
    assert after.boot != before.boot and after.shape.model.startswith("m (updated in place")
    p.compute(key("b"), [1])
    d.load(key("b"), p.address, [1])
    assert d.result().failed_blocks == {1}
    updated.context.renew()
    assert len(updated.context.identity.shape.model) == len(after.shape.model)


@pytest.mark.parametrize("secrets", [("a", "b"), ("", "b"), ("a", "")])
def test_a_different_secret_is_refused(prefill: Make, decode: Make, secrets: tuple[str, str]) -> None:
    p, d = prefill(settings={"secret": secrets[0]}), decode(settings={"secret": secrets[1]})
    p.compute(key("t"), [1])
    d.load(key("t"), p.address, [1])
    assert d.result().failed_blocks == {1}
    assert d.cache.content([1]) == [[bytes(8)]] * 3


def test_the_same_secret_is_accepted(prefill: Make, decode: Make) -> None:
    p, d = prefill(settings={"secret": "s"}), decode(settings={"secret": "s"})
    p.compute(key("t"), [1])
    d.load(key("t"), p.address, [1])
    assert not d.result().failed_blocks


async def test_the_proxy_releases_a_transfer(prefill: Make, decode: Make) -> None:
    p, d = prefill(settings={"secret": "s"}), decode(settings={"secret": "s"})
    d.load(key("t"), p.address, [1])
    await asyncio.to_thread(_wait, lambda: p.send_queue.counts()["wants"] == 1)
    control = await Control.open(p.address, "s")
    assert control.boot == "boot-prefill"
    await control.release("t")
    assert (await asyncio.to_thread(d.result)).failed_blocks == {1}
    await control.close()


async def test_welcome_proves_the_announcement_to_the_proxy(prefill: Make) -> None:
    fields = {"type": "P", "zmq_address": "127.0.0.1:1", "kv_links": {"a": "tcp"}}
    p = prefill(settings={"secret": "s"})
    control = await Control.open(p.address, "s")
    with pytest.raises(Refused, match="release of disagg_kv does not prove"):
        check_announced(control.announced, fields)
    await control.close()
    p.context.announcement = lambda: fields
    control = await Control.open(p.address, "s")
    await control.close()
    assert check_announced(control.announced, {**fields, "kv_links": {}}) == list(CHANGING)
    with pytest.raises(Refused, match="did not send this announcement"):
        check_announced(control.announced, {**fields, "type": "D"})


async def test_the_proxy_releases_a_transfer_on_decode(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    d.load(key("t"), p.address, [1])
    control = await Control.open(d.address)
    await control.release("t")
    assert (await asyncio.to_thread(d.result)).failed_blocks == {1}
    await control.close()


async def test_the_proxy_connects_two_engines(prefill: Make, decode: Make) -> None:
    p, d = prefill(), decode()
    control = await Control.open(d.address)
    await control.meet(p.address)
    await control.meet(p.address)
    await asyncio.to_thread(_wait, lambda: p.send_queue.counts()["peers"] == 1 and p.server.connections() == 1)
    p.compute(key("t"), [1])
    d.load(key("t"), p.address, [1])
    assert not (await asyncio.to_thread(d.result)).failed_blocks
    assert p.server.connections() == 1
    await control.meet("10.0.0.1:5")
    await soon(control.wait_closed())
    await control.close()


async def test_the_proxy_notices_the_end_of_an_engine(prefill: Make) -> None:
    p = prefill()
    control = await Control.open(p.address)
    closed = asyncio.create_task(control.wait_closed())
    p.server.close()
    await soon(closed)
    await control.close()
    with pytest.raises(OSError):
        await Control.open(p.address)


@pytest.mark.parametrize(("theirs", "mine"), [("s", ""), ("s", "x"), ("", "x")])
async def test_the_proxy_with_a_wrong_secret(prefill: Make, theirs: str, mine: str) -> None:
    with pytest.raises(Refused, match="secret"):
        await Control.open(prefill(settings={"secret": theirs}).address, mine)


def test_an_own_proof_cannot_be_sent_back(prefill: Make) -> None:
    p = prefill(settings={"secret": "s"})
    channel = Channel.connect(("127.0.0.1", p.server.port), 5, 5)
    hello = {"name": "disagg_kv", "version": 1, "role": "control", "boot": "x", "rank": 0, "shape": None,
             "nonce": nonce()}  # fmt: skip
    channel.write(encode(Kind.HELLO, hello))
    _, welcome = channel.next_frame()
    channel.write(encode(Kind.PROOF, {"proof": welcome["proof"]}))
    assert channel.next_frame()[0] is Kind.REFUSE
    channel.close()


@pytest.fixture(scope="module")
def hostile() -> Any:
    p = Prefill(settings={"stall_timeout_s": 2.0})
    yield p
    p.server.close()


@given(st.lists(st.binary(max_size=200) | st.sampled_from([
    encode(Kind.WANT, {"t": "t", "p": "0" * 32, "first": 0, "count": 1}), encode(Kind.PROOF, {"proof": "\ud800"}),
    encode(Kind.HELLO, {"name": "disagg_kv", "version": 1, "role": "control", "boot": "x", "rank": 0, "shape": None}),
    encode(Kind.HELLO, {"name": "disagg_kv", "version": 1, "role": "decode", "boot": "x", "rank": 0,
                        "shape": SHAPE.__dict__, "transports": ["tcp"], "staging": 64}),
    encode(Kind.PROOF, {"proof": ""}), encode(Kind.RELEASE, {"t": "t"}), b"\xff\xff\xff\xff", b"\x00\x00\x00\x05",
]), max_size=4))  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_end_the_listener(hostile: Prefill, parts: list[bytes]) -> None:
    connected = socket.create_connection(("127.0.0.1", hostile.server.port), timeout=60)
    with connected as sock, contextlib.suppress(OSError):
        for part in parts:
            sock.sendall(part)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
    _wait(lambda: hostile.server.connections() == 0)
    assert hostile.send_queue.counts() == {"jobs": 0, "requests": 0, "wants": 0, "peers": 0}
    d = Decode()
    hostile.compute(key("after"), [1], seed=4, request="after")
    d.load(key("after"), hostile.address, [6])
    assert not d.result().failed_blocks
    hostile.send_queue.finish({"after"})
    _wait(lambda: hostile.send_queue.collect() == {"after"})
    d.close()
    _wait(lambda: hostile.server.connections() == 0)


def test_an_idle_handshake_is_closed(prefill: Make) -> None:
    p = prefill(settings={"stall_timeout_s": 0.1})
    with socket.create_connection(("127.0.0.1", p.server.port), timeout=60) as sock:
        assert sock.recv(1) == b""


def test_a_prefill_that_sends_half_of_it_fails_the_load(decode: Make) -> None:
    """Half a segment arrives, then nothing: the load fails after the stall limit, not at its deadline."""
    d = decode(settings={"stall_timeout_s": 1.0})
    with socket.create_server(("127.0.0.1", 0)) as server:
        d.load(key("t"), f"127.0.0.1:{server.getsockname()[1]}", [1, 2], seconds=600)
        sock, _ = server.accept()
        channel = Channel(sock, 60)
        _kind, _hello = channel.next_frame()
        welcome = {"name": "disagg_kv", "version": 1, "role": "prefill", "boot": "x", "rank": 0,
                   "shape": SHAPE.__dict__, "nonce": "n", "transport": "tcp", "proof": ""}  # fmt: skip
        channel.write(encode(Kind.WELCOME, welcome))
        assert channel.next_frame()[0] is Kind.PROOF
        channel.write(encode(Kind.READY, {"transport": "tcp", "staging": 64}))
        assert channel.next_frame()[0] is Kind.WANT
        channel.write(encode(Kind.GO, {**key("t").to_wire(), "first": 0, "count": 2, "last": True}) + bytes(10))
        assert d.result().failed_blocks == {1, 2}
        channel.close()


def _accept(server: socket.socket, **more: Any) -> Channel:
    """The first decode engine that connects, after a handshake whose WELCOME has these fields too."""
    channel = Channel(server.accept()[0], 60)
    assert channel.next_frame()[0] is Kind.HELLO
    welcome = {"name": "disagg_kv", "version": 1, "role": "prefill", "boot": "x", "rank": 0, "shape": SHAPE.__dict__,
               "nonce": "n", "transport": "tcp", "proof": "", **more}  # fmt: skip
    channel.write(encode(Kind.WELCOME, welcome))
    assert channel.next_frame()[0] is Kind.PROOF
    channel.write(encode(Kind.READY, {"transport": "tcp", "staging": 64}))
    return channel


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a stall limit of 0.2 s, which the handshake could miss on a busy machine."""
    monkeypatch.setattr("disagg_kv.decode.peer_connection.Liveness", lambda seconds: Liveness(0.2))


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Waits for so many intervals of liveness probes."""
    counted, probe = threading.Semaphore(0), Liveness.check

    def counting(self: Liveness, receiving: bool = False) -> bool:
        counted.release()
        return probe(self, receiving)

    monkeypatch.setattr(Liveness, "check", counting)

    def wait(count: int) -> None:
        for _ in range(count):
            assert counted.acquire(timeout=60)

    return wait


@pytest.mark.usefixtures("quick_probes")
def test_a_prefill_that_has_stopped_fails_every_load(decode: Make) -> None:
    """It has shaken hands, its kernel takes the bytes, and nothing comes: as after SIGSTOP."""
    d = decode()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        d.load(key("t"), address, [1, 2], seconds=600)
        channel = _accept(server, ping=True)
        d.load(key("u"), address, [3], seconds=600)
        news = d.result(2)
        assert news.failed_blocks == {1, 2, 3}
        assert set(news.reasons) == {f"the prefill engine did not answer {PROBES} liveness probes"}
        channel.close()


@pytest.mark.usefixtures("quick_probes")
def test_an_idle_connection_is_not_probed(
    prefill: Make, decode: Make, probes: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = prefill(), decode()
    d.load(key("t"), p.address, [1])
    probes(3)
    idle, waits_for = threading.Event(), d.pending.waits_for

    def looked(peer: str) -> bool:
        if not (waits := waits_for(peer)):
            idle.set()
        return waits

    monkeypatch.setattr(d.pending, "waits_for", looked)
    p.compute(key("t"), [1])
    assert not d.result().failed_blocks
    assert idle.wait(60)
    monkeypatch.setattr(Liveness, "check", lambda *_: pytest.fail("it is probed"))
    assert not threading.Event().wait(0.1)
    p.compute(key("u"), [2])
    d.load(key("u"), p.address, [2])
    assert not d.result().failed_blocks, "its writer still runs"


@pytest.mark.usefixtures("quick_probes")
def test_an_older_prefill_is_not_probed(decode: Make) -> None:
    """It would close the connection: its WELCOME has no "ping"."""
    d = decode()
    with socket.create_server(("127.0.0.1", 0)) as server:
        d.load(key("t"), f"127.0.0.1:{server.getsockname()[1]}", [1], seconds=3.0)
        channel = _accept(server)
        assert d.result().reasons == ("not received in time",)
        assert [channel.next_frame()[0] for _ in range(2)] == [Kind.WANT, Kind.RELEASE]
        channel.close()


def test_an_older_decode_hears_no_pong(prefill: Make) -> None:
    p = prefill()
    channel = Channel.connect(("127.0.0.1", p.server.port), 5, 5)
    channel.write(encode(Kind.HELLO, {"name": "disagg_kv", "version": 1, "role": "decode", "boot": "x", "rank": 0,
                                      "shape": SHAPE.__dict__, "nonce": nonce(), "transports": ["tcp"],
                                      "staging": 64}))  # fmt: skip
    assert channel.next_frame()[1]["ping"] is True
    channel.write(encode(Kind.PROOF, {"proof": ""}))
    assert channel.next_frame()[0] is Kind.READY
    channel.write(encode(Kind.WANT, {**key("t").to_wire(), "first": 0, "count": 1}))
    p.compute(key("t"), [1])
    assert channel.next_frame()[0] is Kind.GO
    channel.close()


@pytest.mark.usefixtures("quick_probes")
def test_a_long_step_is_no_silence(prefill: Make, decode: Make, probes: Callable[[int], None]) -> None:
    """The sender waits for the step's KV meanwhile; PONG does not wait for the sender."""
    p, d = prefill(), decode()
    passed = threading.Event()
    p.cache.fill([2], 5)
    p.send_queue.open(key("t"), "r", 1)
    p.send_queue.progress("r", [2], 1, lambda: passed.wait(60))
    d.load(key("t"), p.address, [9])
    probes(PROBES + 5)
    passed.set()
    assert not d.result().failed_blocks
    assert d.cache.content([9]) == p.cache.content([2])


@pytest.mark.usefixtures("quick_probes")
def test_a_long_transfer_is_no_silence(
    prefill: Make, decode: Make, probes: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PONG comes behind the KV, which has a limit of its own."""
    p, d = prefill(), decode()
    going = threading.Event()
    for name in ("send", "receive"):
        move = getattr(MemoryTransport, name)
        monkeypatch.setattr(
            MemoryTransport, name, lambda *args, move=move: move(*args) if going.wait(60) else pytest.fail("stuck")
        )
    p.compute(key("t"), [1])
    d.load(key("t"), p.address, [1])
    probes(PROBES + 5)
    going.set()
    assert not d.result().failed_blocks
    assert d.cache.content([1]) == p.cache.content([1])
    p.compute(key("u"), [2])
    d.load(key("u"), p.address, [2])
    assert not d.result().failed_blocks, "frames are in order after it"


def test_a_connection_that_is_never_made_fails_its_loads(
    prefill: Make, decode: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL waits without end for a peer that stops while its communicator is made."""
    monkeypatch.setattr("disagg_kv.decode.peer_connection._OPEN_SECONDS", 0.2)
    stuck = threading.Event()
    monkeypatch.setattr("disagg_kv.decode.peer_connection.open_transport", lambda *args: stuck.wait(60) and None)
    p, d = prefill(), decode()
    try:
        d.load(key("t"), p.address, [1], seconds=600)
        assert d.result().failed_blocks == {1}
    finally:
        stuck.set()
