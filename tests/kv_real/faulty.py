"""The connector with faults that a test switches on and off, by writing a word into the file FAULT_FILE.

``corrupt``: what prefill sends has every bit flipped. ``slow``: each row takes a quarter of a second to gather.
vLLM loads this module by its path; nothing but the engine's process imports it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from disagg_kv.connector import DisaggKVConnector
from disagg_kv.engine.layout import TorchCache

_FILE = Path(os.environ["FAULT_FILE"])
_GATHER = TorchCache.gather


def _gather(self: TorchCache, plane: int, index: Any, out: Any) -> None:
    fault = _FILE.read_text() if _FILE.exists() else ""
    _GATHER(self, plane, index, out)
    if fault == "corrupt":
        out.bitwise_not_()
    elif fault == "slow":
        time.sleep(0.25)


TorchCache.gather = _gather  # type: ignore[method-assign]

__all__ = ["DisaggKVConnector"]
