"""Which transports this engine can use, and how each is opened once both sides have agreed on one."""

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
"""Larger pieces make nothing faster there."""


@dataclass
class Node:
    """What every connection of one rank needs to know."""

    identity: Identity
    """Of the next handshake; see ``renew``."""
    settings: Settings
    cache: BlockCache
    trace: Trace
    opener: Callable[[Node, Channel, Mapping[str, Any]], Transport] | None = None
    """In place of ``open_transport``, for a cache that is not torch's."""

    def renew(self) -> None:
        """The model is not the one it was: for every peer, of any release, and for the proxy this is now an engine that
        has been restarted with a model that no other one has."""
        shape, boot = self.identity.shape, uuid.uuid4().hex
        assert shape is not None
        model = f"{shape.model.partition(_UPDATED)[0]}{_UPDATED}{boot[:8]})"
        self.identity = replace(self.identity, boot=boot, shape=replace(shape, model=model, digest=boot))

    def transports(self) -> list[str]:
        """Names in order of preference. ValueError if NCCL is asked for without a GPU."""
        wanted = self.settings.transport
        if wanted == "nccl" and not self.cache.on_gpu:
            raise ValueError("transport is nccl, but the KV cache is not on a GPU")
        if wanted == "auto":
            return ["nccl", "tcp"] if self.cache.on_gpu else ["tcp"]
        return [wanted]

    def overlaps(self, transport: str) -> bool:
        """Whether prefill sends layers while later ones are being computed."""
        return self.settings.overlap == "always" or (self.settings.overlap == "auto" and transport == "nccl")

    @property
    def staging_bytes(self) -> int:
        """The most that this side wants to spend on one buffer, but at least one row."""
        return max(self.settings.staging_mb << 20, int(self.cache.row_bytes))


def terms(node: Node, name: str, staging: object) -> dict[str, Any]:
    """Prefill's part of opening a transport: fields of READY. ``staging`` is what decode offers in HELLO."""
    if not isinstance(staging, int) or isinstance(staging, bool) or staging < node.cache.row_bytes:
        raise WireError("the staging size is missing or too small")
    size = min(staging, node.staging_bytes)
    if name == "tcp":
        return {"transport": name, "staging": max(min(size, _MAX_TCP_STAGING), node.cache.row_bytes)}
    from disagg_kv.transport.nccl import new_unique_id

    return {"transport": name, "staging": size, "nccl": new_unique_id().hex()}


def open_transport(node: Node, channel: Channel, ready: Mapping[str, Any]) -> Transport:
    """Both sides' last step. WireError for terms that make no sense; whatever NCCL raises."""
    staging = ready.get("staging")
    if not isinstance(staging, int) or not node.cache.row_bytes <= staging <= node.staging_bytes:
        raise WireError("the staging size is not within the limits")
    name = ready.get("transport")
    if name not in node.transports():
        raise WireError(f"transport {str(name)[:20]} was not offered")
    if node.opener is not None:
        return node.opener(node, channel, ready)
    cache = cast("TorchCache", node.cache)
    if name == "tcp":
        from disagg_kv.transport.tcp import TcpTransport

        if node.cache.on_gpu:
            logger.warning("KV travels over TCP through host memory, not NCCL (transport is set so on one side)")
        return TcpTransport(channel, cache, staging)
    from disagg_kv.transport.nccl import DECODE, PREFILL, NcclTransport

    try:
        unique_id = bytes.fromhex(ready["nccl"])
    except (KeyError, TypeError, ValueError):
        raise WireError("the NCCL id is missing") from None
    if len(unique_id) != 128:
        raise WireError("the NCCL id is not 128 bytes")
    rank = PREFILL if node.identity.role == "prefill" else DECODE
    return NcclTransport(cache, rank, unique_id, staging, node.settings.staging_buffers,
                         node.settings.stall_timeout_s, channel)  # fmt: skip
