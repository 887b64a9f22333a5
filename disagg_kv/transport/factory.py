"""Which transports this rank can use, and how one is opened once both sides have agreed on it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from disagg_kv.protocol.frames import WireError
from disagg_kv.protocol.handshake import Identity
from disagg_kv.settings import Settings
from disagg_kv.trace import Trace
from disagg_kv.transport.base import BlockCache, Transport
from disagg_kv.transport.channel import Channel
from disagg_kv.transport.place import Place, host_mark

if TYPE_CHECKING:
    from disagg_kv.engine.layout import TorchCache

logger = logging.getLogger("vllm.disagg_kv")
_UPDATED = " (updated in place, "
_MAX_TCP_STAGING = 16 * 1024 * 1024
"""Larger chunks are not faster over TCP."""


class ExportedMemory(Protocol):
    """Prefill's cache, made readable for processes of the same host."""

    def describe(self) -> dict[str, Any]:
        """Return the field ``memory`` of READY."""


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
    place: Place = field(default_factory=Place)
    memory: ExportedMemory | None = None
    """Of a prefill engine that can use IPC."""

    def renew(self) -> None:
        """Change the identity, because the weights were updated in place.

        Peers of any release and the proxy see an engine that was restarted with a model that no other engine has.
        """
        shape, boot = self.identity.shape, uuid.uuid4().hex
        assert shape is not None
        model = f"{shape.model.partition(_UPDATED)[0]}{_UPDATED}{boot[:8]})"
        self.identity = replace(self.identity, boot=boot, shape=replace(shape, model=model, digest=boot))

    def transports(self) -> list[str]:
        """Names in order of preference, without what this process cannot use.

        Raises:
            ValueError: NCCL is required by the settings, but there is no GPU.
        """
        wanted = self.settings.transport
        if wanted == "nccl" and not self.cache.on_gpu:
            raise ValueError("kv_connector_extra_config: transport is nccl, but the KV cache is not on a GPU")
        names = [wanted]
        if wanted == "auto":
            names = ["nccl", "ipc", "tcp"] if self.cache.on_gpu else ["tcp"]
        elif wanted == "ipc":
            names = ["ipc", "tcp"]
        cannot_offer_ipc = self.identity.role == "prefill" and self.memory is None
        return [name for name in names if name not in self.place.without and not (name == "ipc" and cannot_offer_ipc)]

    def overlaps(self, transport: str) -> bool:
        """Whether prefill sends layers while later ones are being computed. Over IPC decode reads complete blocks."""
        if transport == "ipc":
            return False
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
    if name == "ipc":
        assert context.memory is not None
        return {"transport": name, "staging": size, "memory": context.memory.describe()}
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
    if name == "ipc":
        return _open_ipc(context, channel, ready, staging)
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


def set_up_ipc(context: RankContext, offers: bool) -> None:
    """Find out where this process runs and, where it may use IPC, make its cache readable.

    ``context.place`` gets the reason where IPC cannot be used.

    Args:
        offers: whether this engine offers KV (kv_producer, kv_both).
    """
    cache, reason = context.cache, ""
    place = Place(host=host_mark())
    if cache.on_gpu:
        from disagg_kv.transport import cuda_driver
        from disagg_kv.transport.cuda_memory import CannotShare, ExportedCudaMemory

        try:
            cuda_driver.use_device(cast("TorchCache", cache).device.index or 0)
            gpu, partition = cuda_driver.current_gpu()
            place = replace(place, gpu=gpu, partition=partition)
            if offers and context.settings.transport in ("auto", "ipc"):
                context.memory = ExportedCudaMemory(cast("TorchCache", cache))
        except (CannotShare, cuda_driver.CudaError, OSError, AttributeError) as error:
            reason = str(error)
    elif context.settings.transport == "ipc":
        from disagg_kv.transport.process_memory import ExportedProcessMemory, why_unavailable

        reason = why_unavailable()
        if offers and not reason:
            context.memory = ExportedProcessMemory(cache)
    if reason:
        logger.warning("KV is not read by IPC: %s", reason)
        place = replace(place, without={"ipc": reason})
    context.place = place


def _open_ipc(context: RankContext, channel: Channel, ready: Mapping[str, Any], staging: int) -> Transport:
    """Raises:
    WireError: invalid fields.
    OSError, RuntimeError: prefill's memory cannot be read from here.
    """
    from disagg_kv.transport.ipc import IpcTransport, MemoryReader, read_num_blocks

    stall = context.settings.stall_timeout_s
    if context.identity.role == "prefill":
        return IpcTransport(channel, context.cache, stall)
    memory = ready.get("memory")
    if not isinstance(memory, dict):
        raise WireError("prefill's memory is missing")
    reader: MemoryReader
    if context.cache.on_gpu:
        from disagg_kv.transport import cuda_memory

        _check_kind(memory, cuda_memory.KIND)
        reader = cuda_memory.CudaMemoryReader(cast("TorchCache", context.cache), memory, staging)
    else:
        from disagg_kv.transport import process_memory

        _check_kind(memory, process_memory.KIND)
        reader = process_memory.ProcessMemoryReader(context.cache, memory)
    return IpcTransport(channel, context.cache, stall, reader, read_num_blocks(memory))


def _check_kind(memory: Mapping[str, Any], kind: str) -> None:
    if memory.get("kind") != kind:
        raise WireError(f"prefill's memory is {str(memory.get('kind'))[:20]}, not {kind}")
