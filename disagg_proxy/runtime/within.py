"""A time limit on what a task awaits: ``async with within(seconds):`` raises TimeoutError when it expires.

``asyncio.wait_for`` loses a cancellation before Python 3.12: a task that is cancelled at the moment its wait completes
continues as if it had not been cancelled (python/cpython#86296), and a task that awaits its end hangs. Python 3.10 has
async_timeout from aiohttp. The KV connector has the same helper (disagg_kv/within.py), since neither imports the other
for helpers.
"""

from __future__ import annotations

import sys

if sys.version_info >= (3, 11):
    from asyncio import timeout as within
else:
    from async_timeout import timeout as within

__all__ = ["within"]
