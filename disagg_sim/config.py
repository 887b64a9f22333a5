"""The settings of one simulated engine: names, units, defaults, limits.

Defaults are those of a test: no simulated computing time, ports from the kernel, requests recorded. The command
line (:mod:`disagg_sim.cli`) has its own defaults, whose speeds are like those of a real engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from disagg_sim.step_model import EngineProfile
from disagg_sim.vllm_rules import NEWEST, WITH_P2P_NCCL, VllmRules, parse_version, rules_of

Role = Literal["prefill", "decode"]
Connector = Literal["p2p_nccl", "disagg_kv", "nixl", "moriio"]
CloseAfter400 = Literal["close", "reset", "keep"]


class SimConfigError(ValueError):
    """A setting has a value that no engine could run with; the text names the setting."""


@dataclass(frozen=True)
class SimConfig:
    """Everything that makes one simulated engine differ from another.

    Addresses: ``host`` is bound and announced; ``port`` (HTTP) and ``kv_port`` (KV transfer) may be 0, the kernel
    then chooses. ``proxy`` is the ``host:port`` that pings go to, or several separated by commas; None for
    no pings.

    Raises:
        SimConfigError: on construction, when a value is out of range.
    """

    role: Role = "prefill"
    connector: Connector = "p2p_nccl"
    """KV transfer of vLLM's P2pNcclConnector, of ``disagg_kv`` (docs/connector.md), or of vLLM's NixlConnector or
    MoRIIOConnector. Engines with NixlConnector do not ping."""
    host: str = "127.0.0.1"
    port: int = 0
    kv_port: int = 0
    proxy: str | None = None
    models: tuple[str, ...] = ("sim-model",)
    api_key: str | None = None

    # Speed. Zero means "takes no time".
    startup_seconds: float = 0.0
    """From the start of the worker (pings begin) to the first HTTP answer; about 2 s on real engines."""
    prefill_tokens_per_second: float = 0.0
    time_per_output_token: float = 0.0
    """Seconds of one decode step, whatever the batch holds."""
    profile: EngineProfile | None = None
    """Figures of a measured engine, whose steps and hand-over take that long, instead of the two speeds above."""
    communicator_seconds: float = 0.0
    """Extra time of the first request between one prefill and one decode engine; 1.1 s with NCCL."""

    # Scheduler.
    max_model_len: int = 32768
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    """Prompt tokens of one prefill step; a longer prompt is prefilled in chunks."""
    randomize_request_ids: bool = False
    """As vLLM >= 0.14 without VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1: P and D no longer agree on the KV's key."""
    kv_cache_tokens: int = 8_388_608
    """Tokens that the KV cache holds, in blocks of ``kv_block_size``. The default holds as many requests of the default
    ``max_model_len`` as are in a batch."""
    prefix_cache_blocks: int = 4096
    """Blocks of 16 tokens that a prefill engine's prefix cache holds; 0 turns the cache off."""

    # KV transfer. The defaults are Qwen3-4B in bf16 and the settings of docs/engine-behaviour.md.
    kv_layers: int = 4
    """Tensors per request (Qwen3-4B: 36). At least 2: vLLM answers while the last one is still being sent."""
    kv_bytes_per_token: int = 147_456
    """Bytes that one token's KV counts for in buffer and pool, all layers together."""
    kv_wire_bytes_per_token: int = 0
    """Bytes of padding per token that really travel beside the few bytes that decode needs."""
    kv_buffer_bytes: int = 8_000_000_000
    kv_pool_bytes: int = 4 * 2**30
    """The pinned pool that takes what the buffer does not; handed out in powers of two."""

    # disagg_kv: what both sides of a pair must have in common, and deadlines in seconds. Block size and hold_timeout
    # are those of NixlConnector and MoRIIOConnector too.
    kv_model: str = "sim"
    kv_digest: str | None = ""
    """Announced digest of the weights; empty: derived from ``kv_model``, None: as a release that has no digest."""
    kv_dtype: str = "bfloat16"
    kv_layout: str = "sim"
    kv_block_size: int = 16
    """Tokens of one block; prompts that do not exceed it are not worth a transfer."""
    kv_transports: tuple[str, ...] = ("tcp",)
    """As announced and offered; only TCP is really spoken."""
    tp: int = 1
    kv_secret: str = ""
    kv_both: bool = False
    """disagg_kv on decode: vLLM's ``kv_role`` ``kv_both``, the engine prefills for others as well."""
    read_mode: bool = False
    """MoRIIOConnector's setting: decode reads from prefill, instead of prefill writing to decode."""
    load_timeout: float = 30.0
    """Decode: how long a request waits for its KV before it is computed."""
    hold_timeout: float = 60.0
    """Prefill: how long computed KV waits to be fetched."""
    hold_blocks: int = 0
    """Prefill: blocks of finished prompts that may wait to be fetched; 0: any number."""
    stall_timeout: float = 5.0
    """Decode: the connector's ``stall_timeout_s``. A prefill that answers no PING for twice as long counts as dead."""

    # HTTP behaviour.
    pooling: bool = False
    """Whether the model embeds texts too."""
    version: str = ""
    """The vLLM version to imitate where versions differ (:mod:`disagg_sim.vllm_rules`); GET /version shows it. Empty:
    0.21.0 with P2pNcclConnector, which 0.24 removed, and 0.33.0 otherwise."""
    keepalive_seconds: float = 5.0
    close_after_400: CloseAfter400 = "close"
    """What follows a 400 that vLLM 0.21 raises inside its handler: "close" closes the connection unannounced as
    uvicorn does, "reset" keeps it open and resets it on the next request (the race always lost), "keep" does
    neither."""
    enable_prompt_tokens_details: bool = False
    enable_request_id_headers: bool = False
    enable_auto_tool_choice: bool = True
    """As --enable-auto-tool-choice with --tool-call-parser hermes; without it tool_choice other than none is a 400."""
    enable_profiler: bool = True
    exit_after_death_seconds: float | None = None
    """vLLM's watchdog ends the server within 5 s of the engine's death; None keeps answering 500, as
    VLLM_KEEP_ALIVE_ON_ENGINE_DEATH=1 does."""

    gpu: int | None = None
    """Index of the simulated GPU (:mod:`disagg_sim.gpu`) whose energy pings tell and whose clock is the pace of the
    steps; None: no GPU."""
    gpus_file: str = ""
    """File of simulated GPUs that other processes see too; empty: the GPU is this engine's alone."""

    ping_seconds: float = 3.0
    record_requests: bool = True
    """Keep every HTTP request in ``SimEngine.requests``; for tests, memory grows."""

    def __post_init__(self) -> None:
        if self.role not in ("prefill", "decode"):
            raise SimConfigError(f"role must be prefill or decode, not {self.role!r}")
        if self.connector not in get_args(Connector):
            raise SimConfigError(f"connector must be one of {', '.join(get_args(Connector))}, not {self.connector!r}")
        if self.kv_both and (self.role, self.connector) != ("decode", "disagg_kv"):
            raise SimConfigError("kv_both needs role decode and connector disagg_kv")
        if not self.models or not all(self.models):
            raise SimConfigError("models must name at least one model")
        if self.close_after_400 not in ("close", "reset", "keep"):
            raise SimConfigError(f"close_after_400 must be close, reset or keep, not {self.close_after_400!r}")
        for name in ("port", "kv_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise SimConfigError(f"{name} must be between 0 and 65535")
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise SimConfigError(f"{name} must be at least {least}")
        if self.kv_cache_tokens < self.max_model_len + self.kv_block_size:
            raise SimConfigError(
                f"kv_cache_tokens must hold one request of max_model_len and a block more: at least"
                f" {self.max_model_len + self.kv_block_size}; a lower max_model_len needs less"
            )
        if self.exit_after_death_seconds is not None and self.exit_after_death_seconds < 0:
            raise SimConfigError("exit_after_death_seconds must be at least 0")
        if self.gpu is not None and not 0 <= self.gpu < 64:
            raise SimConfigError("gpu must be from 0 to 63")
        if not self.ping_seconds > 0:
            raise SimConfigError("ping_seconds must be above 0")
        try:
            number = parse_version(self.vllm_version)
        except ValueError:
            raise SimConfigError(f"version must be one of vLLM such as {NEWEST}, not {self.version!r}") from None
        if self.connector == "p2p_nccl" and number >= (0, 24):
            raise SimConfigError(f"vLLM {self.version} has no P2pNcclConnector: choose another connector")

    @property
    def vllm_version(self) -> str:
        """The version that is imitated."""
        return self.version or (WITH_P2P_NCCL if self.connector == "p2p_nccl" else NEWEST)

    @property
    def rules(self) -> VllmRules:
        """The rules of that version."""
        return rules_of(self.vllm_version)

    def shown_hits(self, cached: int) -> int | None:
        """The cached tokens that usage reports; None where it reports none."""
        shown = self.enable_prompt_tokens_details and (cached > 0 or self.rules.reports_no_hits)
        return cached if shown else None

    @property
    def kv_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self.kv_cache_tokens // self.kv_block_size

    @property
    def is_producer(self) -> bool:
        """True on a prefill engine (vLLM's kv_role kv_producer)."""
        return self.role == "prefill"


_AT_LEAST: dict[str, float] = {
    "startup_seconds": 0,
    "prefill_tokens_per_second": 0,
    "time_per_output_token": 0,
    "communicator_seconds": 0,
    "max_model_len": 2,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "kv_cache_tokens": 1,
    "prefix_cache_blocks": 0,
    "kv_layers": 2,
    "kv_bytes_per_token": 1,
    "kv_wire_bytes_per_token": 0,
    "kv_buffer_bytes": 0,
    "kv_pool_bytes": 1,
    "keepalive_seconds": 0,
    "kv_block_size": 1,
    "tp": 1,
    "load_timeout": 0,
    "hold_timeout": 0,
    "hold_blocks": 0,
    "stall_timeout": 0.01,
}


def join_address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """The inverse of :func:`join_address`.

    Raises:
        ValueError: when there is no port.
    """
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)
