"""The connector with faults that a test switches on and off, by writing words into the file FAULT_FILE.

``corrupt``: what prefill sends has every bit flipped; ``corrupt-last``: only the last third of the blocks, which are
of tails where a short prompt has tails; ``zero-last``: those are zeros. ``slow``: each row takes a quarter of a second
to gather. Over IPC decode does ``corrupt`` and ``slow``, as it reads; it looks into prefill's file. ``digest``: the
digests of the rows that are read from and written to the cache, as they lie there, are appended to a file beside it
(``.rows``), a line for each copy.
vLLM loads this module by its path; nothing but the engine's process imports it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from disagg_kv.connector import DisaggKVConnector
from disagg_kv.engine.layout import TorchCache
from disagg_kv.transport.process_memory import ProcessMemoryReader

_FILE = Path(os.environ["FAULT_FILE"])
_GATHER, _SCATTER, _READ = TorchCache.gather, TorchCache.scatter, ProcessMemoryReader.read


def _faults(file: Path = _FILE) -> list[str]:
    return file.read_text().split() if file.exists() else []


def _write_digests(cache: TorchCache, plane: int, index: Any) -> None:
    rows = cache._planes[plane][index]
    found = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in rows]
    with _FILE.with_suffix(".rows").open("a") as out:
        out.write(json.dumps({"plane": plane, "rows": found}) + "\n")


def _gather(self: TorchCache, plane: int, index: Any, out: Any) -> None:
    faults = _faults()
    _GATHER(self, plane, index, out)
    if "digest" in faults:
        _write_digests(self, plane, index)
    if "corrupt" in faults:
        out.bitwise_not_()
    elif "corrupt-last" in faults:
        out[-(len(index) // 3) * self.row_bytes :].bitwise_not_()
    elif "zero-last" in faults:
        out[-(len(index) // 3) * self.row_bytes :].zero_()
    elif "slow" in faults:
        time.sleep(0.25)


def _scatter(self: TorchCache, plane: int, index: Any, rows: Any) -> None:
    _SCATTER(self, plane, index, rows)
    if "digest" in _faults():
        _write_digests(self, plane, index)


def _read(self: ProcessMemoryReader, source: Any, target: Any, fence: Any, seconds: float) -> None:
    faults = _faults(_FILE.with_name("prefill.fault"))
    if "slow" in faults:
        time.sleep(1)
    _READ(self, source, target, fence, seconds)
    if "corrupt" in faults:
        for address, stride in self._target:
            for block in target:
                row = (ctypes.c_ubyte * self._row_bytes).from_address(address + block * stride)
                row[:] = [byte ^ 255 for byte in row]


TorchCache.gather = _gather  # type: ignore[method-assign]
TorchCache.scatter = _scatter  # type: ignore[method-assign]
ProcessMemoryReader.read = _read  # type: ignore[method-assign]

__all__ = ["DisaggKVConnector"]
