"""How runs of blocks are split_into_chunks: everything once, in order, within the buffer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_kv.transport.chunks import split_into_chunks


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 64), st.integers(0, 3000))
def test_every_row_is_in_one_chunk(planes: int, blocks: int, row: int, more: int) -> None:
    staging, rows = row + more, []
    for chunk in split_into_chunks(planes, blocks, row, staging):
        assert chunk.planes * chunk.blocks * row <= staging
        assert chunk.planes == 1 or chunk.blocks == blocks
        rows += [(chunk.plane + plane, chunk.block + block)
                 for plane in range(chunk.planes) for block in range(chunk.blocks)]  # fmt: skip
    assert rows == [(plane, block) for plane in range(planes) for block in range(blocks)]


def test_a_buffer_below_one_row() -> None:
    with pytest.raises(ValueError, match="staging buffer"):
        list(split_into_chunks(2, 2, 100, 99))
