"""The KV port takes no connections from strangers, and few that do not complete their handshake."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from disagg_kv.control import Control
from disagg_kv.prefill import server
from disagg_kv.prefill.admission import MAX_UNPROVED
from disagg_kv.protocol.handshake import Refused
from disagg_kv.settings import Settings
from disagg_kv.transport.channel import Channel
from tests.kv.memory import Decode, Prefill, key


@pytest.fixture
def connect() -> Iterator[Callable[[Prefill], socket.socket]]:
    with ExitStack() as stack:

        def one(prefill: Prefill) -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", prefill.server.port), timeout=10))

        yield one


def _closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


async def test_the_oldest_unproved_connection_is_closed(connect, prefill, decode, caplog) -> None:
    """Peers still connect, and existing connections are not counted with them."""
    p: Prefill = prefill(settings={"max_connections": 2})
    d: Decode = decode()
    p.compute(key("t"), [1])
    d.load(key("t"), p.address, [1])
    assert not d.result().failed_blocks
    with caplog.at_level(logging.WARNING, "vllm.disagg_kv"):
        strangers = [connect(p) for _ in range(MAX_UNPROVED + 2)]
        assert _closed(strangers[0]) and _closed(strangers[1])
        control = await Control.open(p.address)
    assert "too many connections without a completed handshake" in caplog.text
    with pytest.raises(Refused, match="max_connections"):
        await Control.open(p.address)
    await control.close()
    p.compute(key("u"), [1])
    d.load(key("u"), p.address, [1])
    assert not d.result().failed_blocks


def test_a_handshake_has_one_deadline(connect, prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single bytes in time do not prolong it."""
    monkeypatch.setattr(server, "_HANDSHAKE_SECONDS", 0.3)
    sock = connect(prefill())
    sock.settimeout(0.02)
    sock.sendall((60_000).to_bytes(4, "big"))
    began, closed = time.monotonic(), False
    while not closed and time.monotonic() - began < 60:
        try:
            sock.sendall(b"x")
            closed = sock.recv(1) == b""
        except TimeoutError:
            continue
        except ConnectionError:
            closed = True
    assert closed and time.monotonic() - began > 0.2


def test_the_limit_of_a_handshake_ends_with_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as theirs:
        channel = Channel(listener.accept()[0], 5)
        channel.limit(0.01)
        with pytest.raises(TimeoutError):
            channel.read_into(memoryview(bytearray(1)))
        channel.limit(None)
        theirs.sendall(b"x")
        channel.read_into(memoryview(bytearray(1)))
        channel.close()


def test_strangers_are_closed_at_once(connect, prefill, caplog) -> None:
    p = prefill(settings={"peers": ("10.0.0.0/8",)})
    with caplog.at_level(logging.WARNING, "vllm.disagg_kv"):
        assert _closed(connect(p)) and _closed(connect(p))
    assert caplog.text.count("127.0.0.1 is not in the networks of the setting peers") == 1


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        ("10.1.2.3", True), ("11.1.2.3", False), ("::ffff:10.1.2.3", True), ("::ffff:11.1.2.3", False),
        ("192.168.0.9", True), ("127.0.0.1", False), ("fe80::1%eth0", False), ("fd00::5", True),
    ],
)  # fmt: skip
def test_who_may_connect(host: str, accepted: bool) -> None:
    settings = Settings(peers=("10.0.0.0/8", "fd00::/8"), proxy_ip="192.168.0.9", proxy_port=1, http_port=2)
    assert settings.may_connect(host) is accepted


@pytest.mark.parametrize(
    ("listen", "peers", "narrow"),
    [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "10.0.0.0/8", False), ("::1", None, False)],
)
def test_a_port_for_others_that_lets_none_in_is_noticed(listen: str, peers: str | None, narrow: bool) -> None:
    settings = Settings.load({"listen": listen, **({"peers": peers} if peers else {})}, {})
    assert settings.peers_too_narrow is narrow
