"""What both sides of ``disagg_kv`` share in the simulation: the engine's identity, its announcement, and frames.

On the wire a block is one row of one plane, which is what the TCP transport of ``disagg_kv`` sends for such a cache.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any

from disagg_kv import PROTOCOL_NAME, PROTOCOL_VERSION, __version__
from disagg_kv.protocol.frames import Kind, WireError, decode_body, encode, frame_length
from disagg_kv.protocol.handshake import Identity, Refused, Shape, secret_mark
from disagg_kv.protocol.keys import Key, fingerprint, parse_address, transfer_id
from disagg_sim.config import SimConfig
from disagg_sim.connectors.blocks import row_bytes
from disagg_sim.request import EngineRequest

HANDSHAKE_SECONDS = 5.0
TICK = 0.01
"""Seconds that timers are late by, so that their deadline has surely passed."""


def identity(config: SimConfig, boot: str) -> Identity:
    """Identity of the engine's rank 0 in handshakes; ``boot`` is the ``boot_id`` of its process."""
    shape = Shape(config.kv_model, config.kv_dtype, config.kv_block_size, config.kv_layout, 1, row_bytes(config),
                  config.tp, digest_of(config))  # fmt: skip
    return Identity(config.role, boot, 0, shape)


def digest_of(config: SimConfig) -> str | None:
    """The announced digest of the engine's weights; None for a release that has none."""
    if config.kv_digest == "":
        return hashlib.sha256(config.kv_model.encode()).hexdigest()[:32]
    return config.kv_digest


def announcement(config: SimConfig, boot: str) -> dict[str, Any]:
    """Fields of a ping besides those of P2pNcclConnector (docs/connector.md, "Announcement")."""
    return {
        "protocol": PROTOCOL_NAME,
        "protocol_version": PROTOCOL_VERSION,
        "connector_version": __version__,
        "boot_id": boot,
        "tp": config.tp,
        "layout": config.kv_layout,
        "dtype": config.kv_dtype,
        "block_size": config.kv_block_size,
        "block_bytes": row_bytes(config),
        "kv_model": config.kv_model,
        "transports": list(config.kv_transports),
        **({"roles": ["prefill", "decode"]} if config.kv_both else {}),
        **({"kv_digest": digest, "kv_secret": secret_mark(config.kv_secret)} if (digest := digest_of(config)) else {}),
    }


def read_transfer(request: EngineRequest, *, decode: bool) -> tuple[Key, str] | None:
    """The transfer of a request and, on decode, the ``host:port`` that has its KV.

    None when the request has no usable ``kv_transfer_params``: its prompt is computed.
    """
    params = request.sampling.kv_transfer
    if not isinstance(params, Mapping) or "transfer_id" not in params:
        return None
    try:
        address = str(params.get("from") or "") if decode else ""
        if decode:
            parse_address(address)
        return Key(transfer_id(params["transfer_id"]), fingerprint(request.prompt_ids)), address
    except WireError:
        return None


async def read_frame(reader: asyncio.StreamReader) -> tuple[Kind, dict[str, Any]]:
    """Read the next frame.

    Raises:
        WireError: the bytes are not a frame.
        ConnectionError: the connection has ended.
    """
    try:
        return decode_body(await reader.readexactly(frame_length(await reader.readexactly(4))))
    except asyncio.IncompleteReadError:
        raise ConnectionError("the other side closed the connection") from None


async def expect(reader: asyncio.StreamReader, wanted: Kind) -> dict[str, Any]:
    """Read the next frame, which must be of kind ``wanted``, and return its body.

    Raises:
        Refused: the peer refuses the connection.
        WireError: another frame arrived, or none.
        ConnectionError: the connection has ended.
    """
    kind, body = await read_frame(reader)
    if kind is Kind.REFUSE:
        raise Refused(str(body.get("reason", ""))[:1000])
    if kind is not wanted:
        raise WireError(f"received {kind.name}, expected {wanted.name}")
    return body


def send(writer: asyncio.StreamWriter, kind: Kind, body: Mapping[str, Any]) -> None:
    """Write one frame."""
    writer.write(encode(kind, body))
