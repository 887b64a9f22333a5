"""Splits runs of blocks into chunks that fit a staging buffer. Both sides compute the same chunks.

A block lies in several *planes* (per layer one, or two where keys and values are apart), each with the same number of
bytes per block. A chunk covers either complete planes of all blocks, or some blocks of one plane.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """Planes ``plane`` to ``plane + planes - 1`` of the blocks ``block`` to ``block + blocks - 1`` of a run."""

    plane: int
    planes: int
    block: int
    blocks: int


def split_into_chunks(planes: int, blocks: int, row_bytes: int, staging_bytes: int) -> Iterator[Chunk]:
    """Yield chunks of at most ``staging_bytes``, plane by plane.

    Raises:
        ValueError: one row of one plane does not fit.
    """
    if row_bytes > staging_bytes:
        raise ValueError(f"a block of a layer has {row_bytes} bytes, the staging buffer only {staging_bytes}")
    per_chunk = staging_bytes // (row_bytes * blocks)
    if per_chunk:
        for plane in range(0, planes, per_chunk):
            yield Chunk(plane, min(per_chunk, planes - plane), 0, blocks)
        return
    step = staging_bytes // row_bytes
    for plane in range(planes):
        for block in range(0, blocks, step):
            yield Chunk(plane, 1, block, min(step, blocks - block))
