"""The configuration: typed and immutable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from disagg_proxy.address import Address

PROVEN = "proven"
"""Entry of ``allow_register``: announcements count from everywhere once they are proven (discovery/proof.py)."""


@dataclass(frozen=True, slots=True)
class StaticInstance:
    """An instance named on the command line instead of found by its pings.

    Attributes:
        http_address: "host:port" of its OpenAI server.
        kv_address: "host:port" of its KV connector, None when unknown until it pings, or not needed.
        protocol: its KV protocol, None until its pings tell: then it is taken to run P2pNcclConnector.
    """

    http_address: str
    kv_address: str | None = None
    protocol: str | None = None


@dataclass(frozen=True, slots=True)
class EngineGpus:
    """GPUs of an engine on this machine.

    Attributes:
        address: of its OpenAI server.
        gpus: indices as in ``nvidia-smi``, or UUIDs.
    """

    address: Address
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """All settings. Meanings, units and defaults: ``disagg_proxy/config/table.py``."""

    config_file: str = ""
    http_host: str = "0.0.0.0"
    http_port: int = 10001
    workers: int = 1
    zmq_host: str = "0.0.0.0"
    zmq_port: int = 30001
    prefill: tuple[StaticInstance, ...] = ()
    decode: tuple[StaticInstance, ...] = ()
    allow_register: tuple[str, ...] = ("local",)
    instance_expiry: float = 10.0
    forward_registrations: tuple[Address, ...] = ()
    power_meter: bool = True
    power_gpus: tuple[EngineGpus, ...] = ()
    probe_interval: float = 5.0
    connect_timeout: float = 5.0
    prefill_timeout: float = 600.0
    decode_timeout: float = 600.0
    freeze_after_min: float = 20.0
    freeze_after_max: float = 300.0
    body_timeout: float = 60.0
    header_timeout: float = 20.0
    send_timeout: float = 300.0
    shutdown_grace: float = 30.0
    max_body_bytes: int = 64 * 1024 * 1024
    max_header_bytes: int = 64 * 1024
    max_tries: int = 3
    max_in_flight: int = 0
    prefill_max_in_flight: int = 0
    decode_max_in_flight: int = 256
    kv_buffer_bytes: int = 0
    kv_bytes_per_token: int = 0
    decode_alone: bool = True
    decode_alone_below: int = 0
    placement: Literal["split", "elastic"] = "split"
    slo_ttft_ms: float = 0.0
    slo_tpot_ms: float = 0.0
    max_queue: int = 4096
    queue_timeout: float = 120.0
    prefill_policy: str = "prefix_aware"
    decode_policy: str = "joint"
    roles: Literal["placement", "auto", "announced"] = "placement"
    session_header: str = "X-Session-Id"
    load_bound: float = 2.0
    api_key: str = ""
    api_keys_file: str = ""
    engine_api_key: str = ""
    admin_key: str = ""
    kv_secret: str = ""
    kv_secret_file: str = ""
    cors_origins: tuple[str, ...] = ()
    enable_profiling: bool = False
    served_by_header: bool = False
    stream_error_event: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    power_status_file: str = ""
    access_log: str = "off"
    traces: bool = False

    @property
    def kv_buffer_tokens(self) -> int:
        """Prompt tokens that fit into the configured KV buffer of one decode; 0 when its size is not known."""
        if not self.kv_buffer_bytes or not self.kv_bytes_per_token:
            return 0
        return max(1, self.kv_buffer_bytes // self.kv_bytes_per_token)
