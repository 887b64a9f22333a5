"""What both sides of this project's own connector share in the simulation: the cache's shape, its bytes, frames.

A block's bytes are the digest of the prompt up to its end, as real KV depends on all tokens before: the last block's
are the seed of the answer (:mod:`disagg_sim.text`), and a wrong block anywhere shows. On the wire they are one
plane of rows, which is what ``disagg_kv``'s own TCP transport would send for such a cache.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_kv import PROTOCOL_NAME, PROTOCOL_VERSION, __version__
from disagg_kv.protocol.frames import Kind, WireError, decode_body, encode, frame_length
from disagg_kv.protocol.handshake import Identity, Refused, Shape
from disagg_kv.protocol.keys import Key, fingerprint, parse_address, transfer_id
from disagg_sim.config import SimConfig
from disagg_sim.request import EngineRequest
from disagg_sim.text import SEED_BYTES

HANDSHAKE_SECONDS = 5.0


def row_bytes(config: SimConfig) -> int:
    """Bytes of one block on the wire."""
    return SEED_BYTES + config.kv_block_size * config.kv_wire_bytes_per_token


def blocks_of(config: SimConfig, tokens: int) -> int:
    """Blocks that so many tokens take."""
    return -(-tokens // config.kv_block_size)


def rows_of(config: SimConfig, prompt_ids: Sequence[int]) -> list[bytes]:
    """The right bytes of each block of a prompt."""
    digest, rows = hashlib.blake2b(digest_size=SEED_BYTES), []
    padding = bytes(row_bytes(config) - SEED_BYTES)
    for start in range(0, len(prompt_ids), config.kv_block_size):
        digest.update(array("I", prompt_ids[start : start + config.kv_block_size]).tobytes())
        rows.append(digest.copy().digest() + padding)
    return rows


def identity(config: SimConfig, boot: str) -> Identity:
    """Rank 0 of this engine."""
    shape = Shape(config.kv_model, config.kv_dtype, config.kv_block_size, config.kv_layout, 1, row_bytes(config),
                  config.tp, digest_of(config))  # fmt: skip
    return Identity(config.role, boot, 0, shape)


def digest_of(config: SimConfig) -> str | None:
    """What stands for the weights of this engine."""
    if config.kv_digest == "":
        return hashlib.sha256(config.kv_model.encode()).hexdigest()[:32]
    return config.kv_digest


def announcement(config: SimConfig, boot: str) -> dict[str, Any]:
    """What a ping says besides the fields of P2pNcclConnector (docs/connector.md, "Announcement")."""
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
        **({"kv_digest": digest} if (digest := digest_of(config)) else {}),
    }


def read_transfer(request: EngineRequest, *, decode: bool) -> tuple[Key, str] | None:
    """The transfer of a request and, on decode, where its KV is; None if it is to be computed like any other."""
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
    """The next frame.

    Raises:
        WireError: it is none. ConnectionError: the connection has ended.
    """
    try:
        return decode_body(await reader.readexactly(frame_length(await reader.readexactly(4))))
    except asyncio.IncompleteReadError:
        raise ConnectionError("the other side closed the connection") from None


async def expect(reader: asyncio.StreamReader, wanted: Kind) -> dict[str, Any]:
    """The body of the frame that must come now.

    Raises:
        Refused: the other side does not want this connection. Else as :func:`read_frame`.
    """
    kind, body = await read_frame(reader)
    if kind is Kind.REFUSE:
        raise Refused(str(body.get("reason", ""))[:1000])
    if kind is not wanted:
        raise WireError(f"{kind.name} came instead of {wanted.name}")
    return body


def send(writer: asyncio.StreamWriter, kind: Kind, body: Mapping[str, Any]) -> None:
    """Write one frame."""
    writer.write(encode(kind, body))
