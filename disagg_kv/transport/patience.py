"""Waiting for something that only the other side can end: how often to look, and when to give up."""

from __future__ import annotations

import time
from collections.abc import Callable

from disagg_kv.transport.base import Stalled

_CHECK_SECONDS = 0.002
_PAUSE_SECONDS = 20e-6


def wait_until(done: Callable[[], bool], broken: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Returns when ``done``. Stalled, with the text of ``what``, after ``seconds`` or once ``broken``.

    Both are asked again and again by this one thread, so neither may block.
    """
    start = checked = time.monotonic()
    while not done():
        now = time.monotonic()
        if now - checked > _CHECK_SECONDS:
            checked = now
            if broken():
                raise Stalled(f"the peer is gone ({what()})")
            if now - start > seconds:
                raise Stalled(f"no end after {now - start:.1f} s ({what()})")
        time.sleep(_PAUSE_SECONDS)
