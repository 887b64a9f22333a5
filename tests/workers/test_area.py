"""Published texts: whole ones only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.workers.snapshot_slot import SIZE, SnapshotSlot


def test_nothing_published_is_an_empty_text() -> None:
    assert SnapshotSlot(memoryview(bytearray(SIZE))).read() == b""


@given(st.lists(st.binary(max_size=200), min_size=1))
def test_the_newest_text_is_read(texts: list[bytes]) -> None:
    area = SnapshotSlot(memoryview(bytearray(SIZE)))
    for text in texts:
        area.write(text)
        assert area.read() == text


@given(st.binary(min_size=1, max_size=300), st.binary(max_size=300), st.integers(0, 300), st.booleans())
def test_a_writer_that_stops_in_the_middle_leaves_the_text_before(
    before: bytes, after: bytes, written: int, length_too: bool
) -> None:
    area = SnapshotSlot(memoryview(bytearray(SIZE)))
    area.write(before)
    other_half = area._halves[(area._head[0] + 1) & 1]
    other_half[: len(after[:written])] = after[:written]
    if length_too:
        area._head[2 + 2 * ((area._head[0] + 1) & 1)] = len(after)
    assert area.read() == before


def test_a_text_that_changes_while_it_is_read_is_not_believed() -> None:
    area = SnapshotSlot(memoryview(bytearray(SIZE)))
    area.write(b"right")
    area._halves[area._head[0] & 1][0] = ord("w")
    assert area.read() == b""
