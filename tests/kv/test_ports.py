"""Ports from a range: blocks side by side, taken by binding them, with errors that name the setting."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from disagg_kv.ports import NoFreePorts, PortRange, free_block, hold_block, port_of_rank
from disagg_kv.settings import Settings

HOST = f"127.31.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
"""An address of this process: nobody else binds its ports, and no connection starts from it."""


class Ports:
    """Ports of which some are taken; ``held`` are those that were bound and not given back."""

    def __init__(self, *taken: int, code: int = errno.EADDRINUSE) -> None:
        self.taken, self.code = taken, code
        self.held: set[int] = set()

    @contextmanager
    def __call__(self, port: int) -> Iterator[None]:
        if port in self.taken:
            raise OSError(self.code, "refused")
        self.held.add(port)
        try:
            yield
        finally:
            self.held.remove(port)


@pytest.mark.parametrize("text", ["", "21000", "21000-", "-21000", "a-b", "2-1", "0-5", "1-65536", "1-2-3", "1.0-2"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no range of ports such as 21000-22999"):
        PortRange.parse(text)


def test_a_range_is_read_and_shown() -> None:
    assert PortRange.parse(" 21000 - 22999 ") == PortRange(21000, 22999)
    assert str(PortRange.parse("7-7")) == "7-7"


@pytest.mark.parametrize(
    ("ports", "width", "firsts"),
    [("10-13", 1, [10, 11, 12, 13]), ("10-13", 2, [10, 12]), ("10-14", 2, [10, 12]), ("10-12", 4, []), ("7-7", 1, [7])],
)
def test_blocks_are_side_by_side(ports: str, width: int, firsts: list[int]) -> None:
    assert list(PortRange.parse(ports).blocks(width)) == firsts


def test_a_block_with_a_taken_port_is_passed_over_and_given_back() -> None:
    bind = Ports(11, 12)
    with free_block(PortRange(10, 17), 2, bind, "range") as block:
        assert (block.first, block.width) == (14, 2)
        assert bind.held == {14, 15}
    assert bind.held == set()


def test_a_full_range_names_the_setting() -> None:
    bind = Ports(11, 13)
    with pytest.raises(NoFreePorts, match=r"kv_ports 10-13: no 2 consecutive free ports; widen it"):
        free_block(PortRange(10, 13), 2, bind, "kv_ports")
    assert bind.held == set()
    with pytest.raises(NoFreePorts, match=r"kv_ports 10-10: no free port;"):
        free_block(PortRange(10, 10), 1, Ports(10), "kv_ports")
    with pytest.raises(NoFreePorts, match="no 8 consecutive free ports"):
        free_block(PortRange(10, 13), 8, Ports(), "kv_ports")


def test_another_error_ends_the_search() -> None:
    bind = Ports(11, code=errno.EADDRNOTAVAIL)
    with pytest.raises(OSError, match=r"kv_ports 10-17: port 11: refused") as caught:
        free_block(PortRange(10, 17), 2, bind, "kv_ports")
    assert caught.value.errno == errno.EADDRNOTAVAIL and bind.held == set()


def test_an_address_of_another_host_is_named() -> None:
    with pytest.raises(OSError, match="kv_ports 21000-22999: port 21000: Cannot assign requested address"):
        hold_block(PortRange(21000, 22999), 1, "192.0.2.1", "kv_ports")


def test_a_held_block_is_taken_for_others_and_free_for_its_server() -> None:
    ports = PortRange(21000, 21003)
    with hold_block(ports, 2, HOST, "kv_ports") as one, hold_block(ports, 2, HOST, "kv_ports") as two:
        assert (one.first, two.first) == (21000, 21002)
        with pytest.raises(NoFreePorts):
            hold_block(ports, 1, HOST, "kv_ports")
        with (
            closing(socket.create_server((HOST, 21001))) as server,
            closing(socket.create_connection(server.getsockname(), timeout=10)),
        ):
            server.accept()[0].close()
        one.close()
        one.close()
        # Only what listened there is still closing.
        with hold_block(ports, 1, HOST, "kv_ports") as again:
            assert again.first == 21000


def test_a_listening_server_takes_its_port() -> None:
    with (
        closing(socket.create_server((HOST, 21010))),
        hold_block(PortRange(21010, 21011), 1, HOST, "kv_ports") as block,
    ):
        assert block.first == 21011


def test_every_rank_listens_in_the_block_of_the_first() -> None:
    ports = PortRange(21020, 21025)
    said: list[int] = []

    def from_first(value: int) -> int:
        said.append(value)
        return said[0]

    found = [port_of_rank(ports, 3, rank, HOST, "kv_ports", from_first) for rank in range(3)]
    assert [port for port, _ in found] == [21020, 21021, 21022] and said == [21020, 0, 0]
    block = found[0][1]
    assert block is not None and [held for _, held in found[1:]] == [None, None]
    with block, closing(socket.create_server((HOST, 21022))):
        # A second engine at the same address.
        port, other = port_of_rank(ports, 3, 0, HOST, "kv_ports", lambda value: value)
        assert port == 21023 and other is not None
        other.close()


def test_one_rank_says_nothing_to_others() -> None:
    def from_first(value: int) -> int:
        raise AssertionError(value)

    port, block = port_of_rank(PortRange(21030, 21030), 1, 0, HOST, "kv_ports", from_first)
    assert port == 21030 and block is not None
    block.close()


def test_the_setting_of_an_engine() -> None:
    assert Settings.load({"kv_ports": "21000-22999"}, {}).port_range == PortRange(21000, 22999)
    assert Settings.load({}, {}).port_range is None
    with pytest.raises(ValueError, match=r"kv_connector_extra_config: kv_ports: '21000' is no range"):
        Settings.load({"kv_ports": 21000}, {})
