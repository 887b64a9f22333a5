"""Which transports this rank can use, and how one is opened once both sides have agreed on it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from disagg_kv.protocol.frames import WireError
from disagg_kv.protocol.handshake import Identity
from disagg_kv.settings import Settings
from disagg_kv.trace import Trace
from disagg_kv.transport.base import BlockCache, Transport
from disagg_kv.transport.channel import Channel

if TYPE_CHECKING:
    from disagg_kv.engine.layout import TorchCache

logger = logging.getLogger("vllm.disagg_kv")
_UPDATED = " (updated in place, "
_MAX_TCP_STAGING = 16 * 1024 * 1024
"""Larger chunks are not faster over TCP."""


@dataclass
class RankContext:
    """What every connection of one rank needs."""

    identity: Identity
    """For the next handshake; see ``renew``."""
    settings: Settings
    cache: BlockCache
    trace: Trace
    transport_factory: Callable[[RankContext, Channel, Mapping[str, Any]], Transport] | None = None
    """Replaces ``open_transport`` for a cache that is not torch's (tests)."""
    announcement: Callable[[], Mapping[str, Any]] | None = None
    """Returns the announcement that this rank sends; None where it sends none."""

    def renew(self) -> None:
        """Change the identity, because the weights were updated in place.

        Peers of any release and the proxy see an engine that was restarted with a model that no other engine has.
        """
        shape, boot = self.identity.shape, uuid.uuid4().hex
        assert shape is not None
        model = f"{shape.model.partition(_UPDATED)[0]}{_UPDATED}{boot[:8]})"
        self.identity = replace(self.identity, boot=boot, shape=replace(shape, model=model, digest=boot))

    def transports(self) -> list[str]:
        """Names in order of preference.

        Raises:
            ValueError: NCCL is required by the settings, but there is no GPU.
        """
        wanted = self.settings.transport
        if wanted == "nccl" and not self.cache.on_gpu:
            raise ValueError("kv_connector_extra_config: transport is nccl, but the KV cache is not on a GPU")
        if wanted == "auto":
            return ["nccl", "tcp"] if self.cache.on_gpu else ["tcp"]
        return [wanted]

    def overlaps(self, transport: str) -> bool:
        """Whether prefill sends layers while later ones are being computed."""
        return self.settings.overlap == "always" or (self.settings.overlap == "auto" and transport == "nccl")

    @property
    def staging_bytes(self) -> int:
        """Largest staging buffer that this side accepts, in bytes; at least one row."""
        return max(self.settings.staging_mb << 20, int(self.cache.row_bytes))


def offer_transport(context: RankContext, name: str, staging: object) -> dict[str, Any]:
    """Return prefill's fields of READY for the chosen transport.

    Args:
        staging: decode's staging size from HELLO, unchecked.

    Raises:
        WireError: the staging size is missing or too small.
    """
    if not isinstance(staging, int) or isinstance(staging, bool) or staging < context.cache.row_bytes:
        raise WireError("the staging size is missing or too small")
    size = min(staging, context.staging_bytes)
    if name == "tcp":
        return {"transport": name, "staging": max(min(size, _MAX_TCP_STAGING), context.cache.row_bytes)}
    from disagg_kv.transport.nccl import new_unique_id

    return {"transport": name, "staging": size, "nccl": new_unique_id().hex()}


def open_transport(context: RankContext, channel: Channel, ready: Mapping[str, Any]) -> Transport:
    """Open the transport that READY describes; the last step of both sides.

    Raises:
        WireError: invalid fields in READY.
        RuntimeError: from NCCL.
    """
    staging = ready.get("staging")
    if not isinstance(staging, int) or not context.cache.row_bytes <= staging <= context.staging_bytes:
        raise WireError("the staging size is out of range")
    name = ready.get("transport")
    if name not in context.transports():
        raise WireError(f"transport {str(name)[:20]} was not offered")
    if context.transport_factory is not None:
        return context.transport_factory(context, channel, ready)
    cache = cast("TorchCache", context.cache)
    if name == "tcp":
        from disagg_kv.transport.tcp import TcpTransport

        if context.cache.on_gpu:
            logger.warning(
                "KV is sent over TCP through host memory instead of NCCL (it is set so, or NCCL failed to open)"
            )
        return TcpTransport(channel, cache, staging)
    from disagg_kv.transport.nccl import DECODE, PREFILL, NcclTransport

    try:
        unique_id = bytes.fromhex(ready["nccl"])
    except (KeyError, TypeError, ValueError):
        raise WireError("the NCCL id is missing") from None
    if len(unique_id) != 128:
        raise WireError("the NCCL id is not 128 bytes")
    rank = PREFILL if context.identity.role == "prefill" else DECODE
    return NcclTransport(cache, rank, unique_id, staging, context.settings.staging_buffers,
                         context.settings.stall_timeout_s, channel)  # fmt: skip
