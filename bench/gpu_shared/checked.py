"""The connector with aids for this benchmark, which a file per engine switches on and off (``AIDS_FILE``).

``verify``: after each read over CUDA IPC decode compares every byte in both caches, and appends the result to a file
beside it (``.verified``). ``long``: a read is repeated for some seconds, so that a process can be killed in the middle
of it. vLLM loads this module by its name; nothing but an engine's process imports it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from disagg_kv.connector import DisaggKVConnector
from disagg_kv.transport.cuda_memory import CudaMemoryReader

_FILE = Path(os.environ["AIDS_FILE"])
_LONG_SECONDS = 4.0
_READ = CudaMemoryReader.read


def _read(self: CudaMemoryReader, source: Any, target: Any, fence: Any, seconds: float) -> None:
    aids = _FILE.read_text().split() if _FILE.exists() else []
    start = time.monotonic()
    _READ(self, source, target, fence, seconds)
    while "long" in aids and time.monotonic() - start < _LONG_SECONDS:
        _READ(self, source, target, None, seconds)
    if "verify" in aids:
        _write_comparison(self, source, target)


def _write_comparison(reader: CudaMemoryReader, source: Any, target: Any) -> None:
    cache, differ = reader._cache, 0
    with torch.inference_mode(), torch.cuda.stream(reader._stream):
        there = torch.tensor(source, dtype=torch.int64).to(cache.device)
        here = cache.index(target)
        for plane, rows in enumerate(reader._planes):
            mine = cache._planes[plane].index_select(0, here).view(torch.uint8)
            differ += int((mine != rows.index_select(0, there).view(torch.uint8)).any(1).sum())
    with _FILE.with_suffix(".verified").open("a") as out:
        out.write(json.dumps({"blocks": len(source), "planes": cache.planes, "rows_that_differ": differ}) + "\n")


CudaMemoryReader.read = _read  # type: ignore[method-assign]

__all__ = ["DisaggKVConnector"]
