"""Times of transfers, for measurements: one JSON object a line, wall clock seconds. Off unless a file is set."""

from __future__ import annotations

import json
import threading
import time
from typing import Any


class Trace:
    """``trace("sent", blocks=3)`` appends a line; a no-op without a file."""

    def __init__(self, path: str, **common: Any) -> None:
        self._path, self._common = path, common
        self._lock = threading.Lock()

    def __call__(self, event: str, **values: Any) -> None:
        if self._path:
            line = json.dumps({"time": time.time(), "event": event, **self._common, **values})
            with self._lock, open(self._path, "a") as out:
                out.write(line + "\n")
