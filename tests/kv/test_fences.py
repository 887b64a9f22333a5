"""Fences: a sender gets the earliest mark behind which its planes are written, and waits for no later one."""

from __future__ import annotations

import threading

import pytest

from disagg_kv.engine.fences import StepFence
from disagg_kv.transport.base import Stalled


def test_layer_by_layer() -> None:
    fence = StepFence(6)
    fence.layer(0, 2, "a")
    fence.layer(2, 4, "b")
    assert [fence.wait(end, 0) for end in (1, 2, 3, 4)] == ["a", "a", "b", "b"]
    assert not fence.finished
    with pytest.raises(Stalled, match="plane 5 of 6"):
        fence.wait(5, 0.01)
    fence.finish("c")
    assert fence.finished and fence.wait(6, 0) == "c" and fence.wait(1, 0) == "a"


def test_a_layer_out_of_order_means_nothing() -> None:
    fence = StepFence(6)
    fence.layer(2, 4, "b")
    fence.layer(0, 2, "a")
    fence.layer(0, 2, "again")
    with pytest.raises(Stalled):
        fence.wait(3, 0)
    fence.finish("c")
    assert fence.wait(3, 0) == "c" and fence.wait(2, 0) == "a"


def test_all_at_once() -> None:
    fence = StepFence(6)
    fence.finish("c")
    assert fence.wait(1, 0) == "c"


def test_a_sender_is_woken() -> None:
    fence, seen = StepFence(2), []
    waiting = threading.Thread(target=lambda: seen.append(fence.wait(1, 20)))
    waiting.start()
    fence.layer(0, 1, "a")
    waiting.join(20)
    assert seen == ["a"]
