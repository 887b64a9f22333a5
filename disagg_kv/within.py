"""Time limit for awaits in a task: ``async with within(seconds):`` raises TimeoutError when it expires.

``asyncio.wait_for`` is not used: before Python 3.12 it can swallow a cancellation that arrives as the wait ends, and
the task runs on (python/cpython#86296). Python 3.10 has async_timeout from aiohttp.
"""

from __future__ import annotations

import sys

if sys.version_info >= (3, 11):
    from asyncio import timeout as within
else:
    from async_timeout import timeout as within

__all__ = ["within"]
