"""Transfer times for measurements: one JSON object per line, in wall clock seconds. Off unless a file is set.

A process that traces also writes the stacks of all its threads to stderr at SIGUSR1.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import threading
import time
from typing import Any


class Trace:
    """``trace("sent", blocks=3)`` appends a line; a no-op without a file."""

    def __init__(self, path: str, **common: Any) -> None:
        self._path, self._common = path, common
        self._lock = threading.Lock()
        if path:
            faulthandler.register(signal.SIGUSR1, file=2)

    def __call__(self, event: str, **values: Any) -> None:
        if self._path:
            line = json.dumps({"time": time.time(), "event": event, **self._common, **values})
            with self._lock, open(self._path, "a") as out:
                out.write(line + "\n")
