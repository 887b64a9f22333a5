"""SIGHUP as a call on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_hangup(call: Callable[[], None]) -> Iterator[None]:
    """Within, SIGHUP calls ``call`` on the running loop; afterwards it has the effect that it had before.

    ``loop.add_signal_handler`` would leave the default action behind, which ends the process. Main thread only.
    """
    loop = asyncio.get_running_loop()
    before = signal.signal(signal.SIGHUP, lambda number, frame: loop.call_soon_threadsafe(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
