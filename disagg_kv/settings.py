"""Settings of the connector: the keys of ``kv_connector_extra_config``, with defaults and checks."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from disagg_kv.ports import PortRange
from disagg_kv.protocol.frames import WireError
from disagg_kv.protocol.keys import join_address, parse_address
from disagg_kv.secret import SECRET_FILE_VARIABLE, SECRET_VARIABLE, read_secret

TRACE_VARIABLE = "DISAGG_KV_TRACE"
_NAMED = re.compile(r"(?=[^:]*[A-Za-z])[A-Za-z0-9][A-Za-z0-9.-]{0,252}:([1-9][0-9]{0,4})")
_LOOPBACK = ("127.0.0.0/8", "::1/128")


@dataclass(frozen=True)
class Settings:
    """One field per key; the string below each documents it."""

    host_ip: str = ""
    """IP address of this engine that is announced, and that the KV port is bound to unless ``listen`` is set. Default:
    the address that vLLM chooses (VLLM_HOST_IP)."""
    listen: str = "127.0.0.1"
    """IP address that the KV port is bound to. Default: ``host_ip``, or loopback."""
    kv_ports: str = ""
    """Range such as ``21000-22999``. The engine listens on the first block of free ports in it, one port for each
    tensor parallel rank, instead of on ``kv_port`` and those after it."""
    peers: tuple[str, ...] = _LOOPBACK
    """Networks that decode may fetch KV from, and from which connections to the KV port are accepted. Default:
    loopback. Connections from ``proxy_ip`` are accepted too."""
    proxy_ip: str = ""
    """Proxy to announce this engine to; empty: no announcement."""
    proxy_port: int = 0
    proxies: tuple[str, ...] = ()
    """Further proxies to announce this engine to, each ``ip:port`` or ``name:port``. Connections from these IP
    addresses are accepted; a name is resolved at each connect, and its addresses must be in ``peers``."""
    http_port: int = 0
    """Port of this engine's HTTP server, for the announcement."""
    transport: str = "auto"
    """``nccl``, ``tcp``, ``ipc`` (between processes of one host; TCP where that fails), or ``auto``: between GPUs NCCL,
    then IPC, then TCP, on one GPU IPC, then TCP; between CPUs TCP."""
    load_timeout_s: float = 120.0
    """Decode: how long a request waits for its KV before decode computes the prompt."""
    hold_timeout_s: float = 60.0
    """Prefill: how long computed KV waits to be fetched."""
    hold_fraction: float = 0.5
    """Prefill: share of the KV cache for KV that no decode has requested yet; beyond it the newest is freed."""
    stall_timeout_s: float = 5.0
    """How long a started transfer may make no progress. Decode: a prefill engine counts as dead when it answers no PING
    for twice as long while loads wait for it."""
    overlap: str = "auto"
    """Prefill: send layers while later ones are computed: ``always``, ``never``, or ``auto``: over NCCL."""
    min_load_tokens: int = 0
    """Decode: prompts that lack fewer tokens than this are computed locally; 0: one block and one token."""
    staging_mb: int = 64
    """Size of one staging buffer in MiB, on each side of each connection."""
    staging_buffers: int = 3
    max_connections: int = 64
    """To one KV port, besides those whose handshake is not complete; and from one decode rank."""
    max_waiting: int = 4096
    """Prefill: WANTs that may wait for KV that is not offered yet."""
    idle_wait_ms: float = 1.0
    """How long an empty step waits for a transfer to progress, instead of starting the next empty step at once."""
    model_version: str = ""
    """Identifies weights and configuration in place of their digest: engines with the same text exchange KV."""
    energy: str = "on"
    """Whether the announcement says what energy, power and clocks this engine's GPUs have: ``on`` or ``off``."""
    secret: str = ""
    """Shared by all engines and the proxy; preferably set in the environment (DISAGG_KV_SECRET)."""
    secret_file: str = ""
    """File with the secret in its first line, instead of ``secret`` (or DISAGG_KV_SECRET_FILE)."""
    trace: str = ""
    """File to which the times of every transfer are appended as JSON lines (or DISAGG_KV_TRACE)."""

    @classmethod
    def load(cls, extra: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the settings.

        Raises:
            ValueError: an unknown key or an invalid value; the text names the key.
        """
        known = {field.name: field for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in extra.items():
            if name not in known:
                raise ValueError(f"kv_connector_extra_config: {name!r} is unknown (known: {', '.join(known)})")
            values[name] = _convert(name, value, getattr(cls, name))
        if values.get("host_ip"):
            values.setdefault("listen", values["host_ip"])
        if not values.get("secret") and not values.get("secret_file"):
            values["secret"] = environ.get(SECRET_VARIABLE, "")
            values["secret_file"] = "" if values["secret"] else environ.get(SECRET_FILE_VARIABLE, "")
        if values.get("secret_file"):
            if values.get("secret"):
                raise ValueError("kv_connector_extra_config: set secret or secret_file, not both")
            try:
                values["secret"] = read_secret(values["secret_file"])
            except ValueError as error:
                raise ValueError(f"kv_connector_extra_config: secret_file: {error}") from None
        values.setdefault("trace", environ.get(TRACE_VARIABLE, ""))
        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        if self.transport not in ("auto", "nccl", "ipc", "tcp"):
            raise ValueError(f"kv_connector_extra_config: transport is {self.transport!r}, not auto, nccl, ipc or tcp")
        if self.overlap not in ("auto", "always", "never"):
            raise ValueError(f"kv_connector_extra_config: overlap is {self.overlap!r}, not auto, always or never")
        if self.energy not in ("on", "off"):
            raise ValueError(f"kv_connector_extra_config: energy is {self.energy!r}, not on or off")
        for name in ("load_timeout_s", "hold_timeout_s", "stall_timeout_s"):
            if not 0 < getattr(self, name) <= 86400:
                raise ValueError(f"kv_connector_extra_config: {name} must be above 0 and at most 86400 seconds")
        if not 0 < self.hold_fraction <= 1:
            raise ValueError("kv_connector_extra_config: hold_fraction must be above 0 and at most 1")
        for name, low, high in (("staging_mb", 1, 4096), ("staging_buffers", 2, 16), ("max_connections", 1, 4096),
                                ("max_waiting", 1, 1 << 20), ("proxy_port", 0, 65535), ("http_port", 0, 65535),
                                ("min_load_tokens", 0, 1 << 30)):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"kv_connector_extra_config: {name} must be from {low} to {high}")
        if not 0 <= self.idle_wait_ms <= 100:
            raise ValueError("kv_connector_extra_config: idle_wait_ms must be from 0 to 100")
        for name in ("host_ip", "listen"):
            if text := getattr(self, name):
                _check_ip(name, text)
        for network in self.peers:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"kv_connector_extra_config: peers: {error}") from None
        if self.kv_ports:
            try:
                PortRange.parse(self.kv_ports)
            except ValueError as error:
                raise ValueError(f"kv_connector_extra_config: kv_ports: {error}") from None
        if bool(self.proxy_ip) != bool(self.proxy_port) or (self.proxy_ip and not self.http_port):
            raise ValueError("kv_connector_extra_config: proxy_ip, proxy_port and http_port must be set together")
        for proxy in self.proxies:
            named = _NAMED.fullmatch(proxy)
            if not _ip_of(proxy) and not (named and int(named[1]) < 65536):
                raise ValueError(f"kv_connector_extra_config: proxies: {proxy!r} is not ip:port or name:port")
        if self.proxies and not self.http_port:
            raise ValueError("kv_connector_extra_config: proxies and http_port must be set together")

    @property
    def announce_to(self) -> tuple[str, ...]:
        """Registration ports of all proxies that this engine is announced to, each ``ip:port``."""
        first = (join_address(self.proxy_ip, self.proxy_port),) if self.proxy_ip else ()
        return tuple(dict.fromkeys((*first, *self.proxies)))

    @property
    def port_range(self) -> PortRange | None:
        """``kv_ports``, None where it is not set."""
        return PortRange.parse(self.kv_ports) if self.kv_ports else None

    def may_fetch_from(self, address: str) -> bool:
        """Whether decode may connect to this ``ip:port``.

        Raises:
            WireError: malformed address.
        """
        return self._is_peer(ipaddress.ip_address(parse_address(address)[0]))

    def may_connect(self, host: str) -> bool:
        """Whether a connection from this IP address is accepted: a peer's, or a proxy's."""
        ip = ipaddress.ip_address(host.partition("%")[0])
        mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
        proxies = {self.proxy_ip, *map(_ip_of, self.proxies)} - {""}
        return str(mapped or ip) in proxies or self._is_peer(mapped or ip)

    @property
    def peers_too_narrow(self) -> bool:
        """Whether other hosts can reach the KV port and none of them is in ``peers``."""
        return self.peers == _LOOPBACK and not ipaddress.ip_address(self.listen).is_loopback

    def _is_peer(self, ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        return any(ip in ipaddress.ip_network(network) for network in self.peers)


def _ip_of(proxy: str) -> str:
    """The IP address in ``ip:port``; empty where it is a name, or malformed."""
    try:
        return parse_address(proxy)[0]
    except WireError:
        return ""


def _check_ip(name: str, text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"kv_connector_extra_config: {name} is {text!r}, not an IP address") from None


def _convert(name: str, value: Any, default: Any) -> Any:
    try:
        if isinstance(default, tuple):
            items = value.split(",") if isinstance(value, str) else list(value)
            return tuple(str(item).strip() for item in items)
        if isinstance(default, str):
            return str(value)
        if isinstance(value, bool):
            raise ValueError
        return type(default)(value)
    except (TypeError, ValueError):
        raise ValueError(f"kv_connector_extra_config: {name} is {value!r}, not {type(default).__name__}") from None
