"""Snapshots are read completely or not at all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.workers.shared_memory import SLOT_SIZE, SnapshotSlot


def test_an_empty_slot_reads_as_an_empty_text() -> None:
    assert SnapshotSlot(memoryview(bytearray(SLOT_SIZE))).read() == b""


@given(st.lists(st.binary(max_size=200), min_size=1))
def test_the_newest_text_is_read(texts: list[bytes]) -> None:
    slot = SnapshotSlot(memoryview(bytearray(SLOT_SIZE)))
    for text in texts:
        slot.write(text)
        assert slot.read() == text


@given(st.binary(min_size=1, max_size=300), st.binary(max_size=300), st.integers(0, 300), st.booleans())
def test_a_writer_that_stops_halfway_leaves_the_previous_text(
    before: bytes, after: bytes, written: int, length_too: bool
) -> None:
    slot = SnapshotSlot(memoryview(bytearray(SLOT_SIZE)))
    slot.write(before)
    other_half = slot._halves[(slot._head[0] + 1) & 1]
    other_half[: len(after[:written])] = after[:written]
    if length_too:
        slot._head[2 + 2 * ((slot._head[0] + 1) & 1)] = len(after)
    assert slot.read() == before


def test_a_text_that_changes_while_it_is_read_is_rejected() -> None:
    slot = SnapshotSlot(memoryview(bytearray(SLOT_SIZE)))
    slot.write(b"right")
    slot._halves[slot._head[0] & 1][0] = ord("w")
    assert slot.read() == b""
