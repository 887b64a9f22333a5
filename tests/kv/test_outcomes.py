"""Counters of how transfers end: few labels, whatever texts peers send, and sums over steps."""

from __future__ import annotations

import pytest

from disagg_kv.outcomes import LABELS, LOADED, RECOMPUTED, UNFETCHED, Outcomes, add, reason_label


@pytest.mark.parametrize(
    ("reason", "label"),
    [
        ("refused: tp is 1, on decode 2", "refused"),
        ("refused: the shared secret differs", "refused"),
        ("not received in time", "timeout"),
        ("the prefill engine did not answer 10 liveness probes", "no_answer"),
        ("released", "released"),
        ("too much KV waits to be fetched", "overload"),
        ("too many requests wait", "overload"),
        ("the LoRA adapter has different content here", "adapter"),
        ("the prefill engine does not compare LoRA adapters", "adapter"),
        ("the prompt has 2 blocks, not 3", "mismatch"),
        ("the prefill engine closed the connection", "connection"),
        ("ConnectionRefusedError: [Errno 111] Connection refused", "connection"),
        ("RuntimeError: NCCL error: invalid usage", "connection"),
        ("not connected within 30 s", "connection"),
        ("too many connections", "connection"),
        ("expired", "expired"),
        ("not computed", "aborted"),
        ("wanted twice", "duplicate"),
        ("anything that a peer may say", "other"),
        ("", "other"),
    ],
)
def test_labels_are_few(reason: str, label: str) -> None:
    assert reason_label(reason) == label
    assert label in LABELS[RECOMPUTED]


def test_counts_are_taken_once_and_add_up() -> None:
    outcomes = Outcomes()
    assert outcomes.take() == {}
    outcomes.loaded(0)
    outcomes.ended(RECOMPUTED, [])
    assert outcomes.take() == {}, "a step without transfers sends nothing"
    outcomes.loaded(2)
    outcomes.ended(RECOMPUTED, ["released", "expired", "expired"])
    outcomes.ended(UNFETCHED, ["expired", "released"])
    first = outcomes.take()
    assert first == {
        LOADED: 2, RECOMPUTED: {"released": 1, "expired": 2}, UNFETCHED: {"expired": 1, "other": 1},
    }  # fmt: skip
    outcomes.loaded(1)
    outcomes.ended(RECOMPUTED, ["released"])
    total = dict(first)
    add(total, outcomes.take())
    assert total == {LOADED: 3, RECOMPUTED: {"released": 2, "expired": 2}, UNFETCHED: {"expired": 1, "other": 1}}
    assert outcomes.take() == {}
