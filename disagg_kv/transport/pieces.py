"""How a run of blocks is cut into pieces that fit a staging buffer. Both sides compute the same cut.

A block lies in several *planes* (per layer one, or two where keys and values are apart), each with the same number of
bytes per block. A piece covers either whole planes of all blocks, or some blocks of one plane.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Planes ``plane`` to ``plane + planes - 1`` of the blocks ``block`` to ``block + blocks - 1`` of a run."""

    plane: int
    planes: int
    block: int
    blocks: int


def cut(planes: int, blocks: int, row_bytes: int, staging_bytes: int) -> Iterator[Piece]:
    """Pieces of at most ``staging_bytes``, plane by plane. ValueError if not even one row of one plane fits."""
    if row_bytes > staging_bytes:
        raise ValueError(f"a block of a layer has {row_bytes} bytes, the staging buffer only {staging_bytes}")
    whole = staging_bytes // (row_bytes * blocks)
    if whole:
        for plane in range(0, planes, whole):
            yield Piece(plane, min(whole, planes - plane), 0, blocks)
        return
    step = staging_bytes // row_bytes
    for plane in range(planes):
        for block in range(0, blocks, step):
            yield Piece(plane, 1, block, min(step, blocks - block))
