"""Looking at a connection while a transfer runs beside it: it never waits, and it sees the end."""

from __future__ import annotations

import concurrent.futures
import socket
import time
from collections.abc import Iterator

import pytest

from disagg_kv.protocol.frames import Kind, encode
from disagg_kv.transport.base import Stalled
from disagg_kv.transport.channel import Channel
from disagg_kv.transport.polling import wait_until


@pytest.fixture
def joined() -> Iterator[tuple[Channel, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        # Whatever waited for data of the other end would not return within a test.
        channel = Channel.connect(server.getsockname(), 600, 600)
        other, _ = server.accept()
    yield channel, other
    channel.close()
    other.close()


def test_a_look_at_a_connection_does_not_wait(joined: tuple[Channel, socket.socket]) -> None:
    """With nothing to read, with something unread, and while another thread reads."""
    channel, other = joined
    assert not channel.broken()
    other.sendall(encode(Kind.PART, {}))
    assert not channel.broken()
    assert channel.next_frame()[0] is Kind.PART
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(channel.next_frame)
        assert not any(channel.broken() for _ in range(1000))
        other.sendall(encode(Kind.GO, {}))
        assert reading.result()[0] is Kind.GO


def test_the_end_of_a_connection_is_seen_before_what_is_unread_is_read(joined: tuple[Channel, socket.socket]) -> None:
    channel, other = joined
    other.sendall(encode(Kind.PART, {}))
    other.shutdown(socket.SHUT_WR)
    wait_until(channel.broken, lambda: False, 60, str)
    assert channel.next_frame()[0] is Kind.PART


def test_a_connection_closed_here_is_broken(joined: tuple[Channel, socket.socket]) -> None:
    joined[0].close()
    assert joined[0].broken()


def test_a_transfer_is_waited_for_on_a_quiet_connection(joined: tuple[Channel, socket.socket]) -> None:
    """It ends when it is done, not when the connection's own limit is over."""
    end = time.monotonic() + 0.05
    wait_until(lambda: time.monotonic() > end, joined[0].broken, 600, lambda: "")


def test_a_transfer_whose_peer_disconnects_is_aborted(joined: tuple[Channel, socket.socket]) -> None:
    joined[1].close()
    with pytest.raises(Stalled, match=r"the peer is gone \(here\)"):
        wait_until(lambda: False, joined[0].broken, 60, lambda: "here")


def test_a_transfer_that_does_not_complete_is_aborted(joined: tuple[Channel, socket.socket]) -> None:
    with pytest.raises(Stalled, match=r"not complete after \d+\.\d s \(here\)"):
        wait_until(lambda: False, joined[0].broken, 0.01, lambda: "here")
