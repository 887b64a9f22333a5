"""KV as blocks of bytes, for the connectors that transfer blocks (``disagg_kv`` and NixlConnector).

A block's bytes are the digest of the prompt up to the block's end, as real KV depends on all tokens before it. The last
block's bytes are the seed of the answer (:mod:`disagg_sim.text`), so a wrong block anywhere shows in the answer.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from disagg_sim.config import SimConfig
from disagg_sim.request import ReceivedKv
from disagg_sim.text import SEED_BYTES


def row_bytes(config: SimConfig) -> int:
    """Bytes of one block on the wire."""
    return SEED_BYTES + config.kv_block_size * config.kv_wire_bytes_per_token


def blocks_of(config: SimConfig, tokens: int) -> int:
    """Number of blocks that ``tokens`` tokens take."""
    return -(-tokens // config.kv_block_size)


def rows_of(config: SimConfig, prompt_ids: Sequence[int]) -> list[bytes]:
    """The right bytes of each block of a prompt."""
    digest, rows = hashlib.blake2b(digest_size=SEED_BYTES), []
    padding = bytes(row_bytes(config) - SEED_BYTES)
    for start in range(0, len(prompt_ids), config.kv_block_size):
        digest.update(array("I", prompt_ids[start : start + config.kv_block_size]).tobytes())
        rows.append(digest.copy().digest() + padding)
    return rows


def received(config: SimConfig, prompt_ids: Sequence[int], rows: Sequence[bytes]) -> ReceivedKv:
    """What decode makes of the blocks that came for a prompt."""
    return ReceivedKv(rows[-1][:SEED_BYTES], garbage=list(rows[:-1]) != rows_of(config, prompt_ids)[:-1])
