"""Who may register: checks host names and addresses against the setting ALLOW_REGISTER."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from disagg_proxy.config.model import PROVEN


class AllowList:
    """Checks the source of a message and the addresses that it announces.

    ``local`` in the setting means loopback, every address of this machine, and its host names. Announced names are
    compared as text, never resolved: resolving a name for an unknown sender can take seconds.

    Args:
        entries: the setting: ``any``, ``local``, ``proven``, addresses, networks in CIDR notation, host names.

    Attributes:
        proven: an announcement from elsewhere counts once it is proven.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self._any = "any" in entries
        self._local = "local" in entries
        self.proven = PROVEN in entries
        self._networks = []
        self._names = set()
        for entry in entries:
            if entry in ("any", "local", PROVEN):
                continue
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                self._names.add(entry.lower())
        if self._local:
            self._names |= {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}

    def permits(self, host: str) -> bool:
        """Whether ``host`` (a name or an address, without port) may register."""
        if self._any:
            return True
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return host.lower() in self._names
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        return any(address in network for network in self._networks) or (self._local and _is_local(address))


def _is_local(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether the address belongs to this machine: only those can be bound."""
    if address.is_loopback:
        return True
    if address.is_multicast or address.is_unspecified:
        return False
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True
