"""Busy waiting for an event that only the peer or the GPU can cause, with limits."""

from __future__ import annotations

import time
from collections.abc import Callable

from disagg_kv.transport.base import Stalled

_CHECK_SECONDS = 0.002
_PAUSE_SECONDS = 20e-6


def wait_until(done: Callable[[], bool], broken: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Return when ``done`` returns True. Both callables are polled by this thread, so neither may block.

    Raises:
        Stalled: ``broken`` returned True or ``seconds`` have passed; the text includes ``what()``.
    """
    start = checked = time.monotonic()
    while not done():
        now = time.monotonic()
        if now - checked > _CHECK_SECONDS:
            checked = now
            if broken():
                raise Stalled(f"the peer is gone ({what()})")
            if now - start > seconds:
                raise Stalled(f"not complete after {now - start:.1f} s ({what()})")
        time.sleep(_PAUSE_SECONDS)
