"""The KV port of each rank with ``kv_ports``, in the worker side that vLLM loads. Needs torch, and no engine."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("msgspec")

from disagg_kv.engine import versions
from disagg_kv.engine.worker import ConnectorWorker
from disagg_kv.settings import Settings

HOST = f"127.33.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
"""An address of this process."""


def worker(rank: int, **extra: Any) -> ConnectorWorker:
    settings = Settings.load({"host_ip": HOST, **extra}, {})
    groups: Any = None
    return ConnectorWorker(False, settings, ("m", ""), groups, 2, rank, 21001, HOST, False)


def test_both_ranks_listen_in_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    monkeypatch.setattr(versions, "from_first_rank", lambda value: said.append(value) or said[0])
    workers = [worker(rank, kv_ports="21040-21043") for rank in range(2)]
    assert [one._kv_port() for one in workers] == [21040, 21041] and said == [21040, 0]
    assert workers[0]._block is not None and workers[1]._block is None
    workers[0]._block.close()


def test_without_a_range_they_count_from_kv_port() -> None:
    assert [worker(rank)._kv_port() for rank in range(2)] == [21001, 21002]


def test_vllm_has_the_group_that_tells_the_first_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of it as one process shows."""
    parallel_state = pytest.importorskip("vllm.distributed.parallel_state")

    class Group:
        def broadcast_object(self, value: int, src: int) -> int:
            assert src == 0
            return value + 1

    assert hasattr(parallel_state.GroupCoordinator, "broadcast_object")
    monkeypatch.setattr(parallel_state, "get_tp_group", Group)
    assert versions.from_first_rank(1) == 2
