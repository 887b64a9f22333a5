"""What counts as an address, and how it is written."""

import pytest

from disagg_proxy.address import parse_address


@pytest.mark.parametrize(
    ("text", "host", "port", "netloc"),
    [
        ("127.0.0.1:20003", "127.0.0.1", 20003, "127.0.0.1:20003"),
        ("::1:20003", "::1", 20003, "[::1]:20003"),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1, "[fe80::1%eth0]:1"),
        ("gpu-box.local:65535", "gpu-box.local", 65535, "gpu-box.local:65535"),
    ],
)
def test_spellings(text: str, host: str, port: int, netloc: str) -> None:
    address = parse_address(text)
    assert (address.text, address.host, address.port, address.netloc) == (text, host, port, netloc)


@pytest.mark.parametrize(
    "text",
    ["", ":", "host", "host:", ":80", "host:0", "host:65536", "host:-1", "a b:1", "a/b:1", "a\n:1", "a___b:1", "é:1",
     "host:８０", "[]:1", "-a:1", "a:1:2", "1::2::3:4", "127.0.0.1:1:2",
     "::1%a%b:1", "x" * 300 + ":1"],
)  # fmt: skip
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"port|host name|___"):
        parse_address(text)
