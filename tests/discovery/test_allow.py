"""Who may register."""

import socket

import pytest

from disagg_proxy.discovery.allow import AllowList


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "LOCALHOST", socket.gethostname()])
def test_local_is_this_machine(host: str) -> None:
    assert AllowList(["local"]).permits(host)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "0.0.0.0", "224.0.0.1", "elsewhere", "unknown", ""])
def test_local_permits_no_other_host(host: str) -> None:
    assert not AllowList(["local"]).permits(host)


def test_addresses_networks_and_names() -> None:
    allow = AllowList(["192.0.2.0/24", "2001:db8::5", "gpu-box"])
    assert allow.permits("192.0.2.77") and allow.permits("2001:db8::5") and allow.permits("GPU-Box")
    assert allow.permits("::ffff:192.0.2.77")
    assert not any(allow.permits(host) for host in ("192.0.3.1", "2001:db8::6", "gpu-box2", "127.0.0.1", "localhost"))


def test_any_is_anybody() -> None:
    assert AllowList(["any"]).permits("whatever")
