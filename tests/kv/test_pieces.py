"""How runs of blocks are cut: everything once, in order, within the buffer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_kv.transport.pieces import cut


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 64), st.integers(0, 3000))
def test_every_row_is_in_one_piece(planes: int, blocks: int, row: int, more: int) -> None:
    staging, rows = row + more, []
    for piece in cut(planes, blocks, row, staging):
        assert piece.planes * piece.blocks * row <= staging
        assert piece.planes == 1 or piece.blocks == blocks
        rows += [(piece.plane + plane, piece.block + block)
                 for plane in range(piece.planes) for block in range(piece.blocks)]  # fmt: skip
    assert rows == [(plane, block) for plane in range(planes) for block in range(blocks)]


def test_a_buffer_below_one_row() -> None:
    with pytest.raises(ValueError, match="staging buffer"):
        list(cut(2, 2, 100, 99))
