"""Addresses: the "host:port" text that instances announce, and its form in URLs.

vLLM joins host and port with a colon and does not bracket IPv6 (0.9.2 - 0.23,
``kv_connector/v1/p2p/p2p_nccl_engine.py``, ``f"{self._hostname}:{self._port}"``), so the last colon is the
separator. The KV address goes into request ids exactly as it was announced, because vLLM connects to that text.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field

_HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?\Z")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9._-]{1,16})?\Z")


@dataclass(frozen=True, slots=True)
class Address:
    """One endpoint.

    Attributes:
        text: as announced. host: without brackets.
        netloc: "host:port" as in a URL, IPv6 in brackets.
    """

    text: str
    host: str
    port: int
    netloc: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        object.__setattr__(self, "netloc", f"{host}:{self.port}")


def parse_address(text: str) -> Address:
    """Read "host:port", "[v6]:port" or vLLM's "v6:port".

    Raises:
        ValueError: not an address. Only characters that cannot end or confuse vLLM's id pattern pass.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) <= 65535:
        raise ValueError(f"{text!r} has no port from 1 to 65535 after a colon")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not (_is_ipv6(host) if ":" in host else _HOST_NAME.match(host)):
        raise ValueError(f"{text!r} has no host name or IP address before its port")
    if "___" in host:
        raise ValueError(f"{text!r} contains ___, which separates the parts of a request id")
    return Address(text, host, int(port))


def _is_ipv6(host: str) -> bool:
    """Whether ``host`` can be put in brackets in a URL; the pattern rejects unusual zone names."""
    try:
        return bool(_IPV6.match(host)) and ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
