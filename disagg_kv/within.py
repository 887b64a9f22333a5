"""A limit in seconds on what a task awaits: ``async with within(seconds):``, TimeoutError when it is over.

``asyncio.wait_for`` is not used: before Python 3.12 a task that is cancelled at the moment its wait is over goes on as
if it had not been (python/cpython#86296), and whoever waits for its end waits for ever. Python 3.10 has
async_timeout from aiohttp.
"""

from __future__ import annotations

import sys

if sys.version_info >= (3, 11):
    from asyncio import timeout as within
else:
    from async_timeout import timeout as within

__all__ = ["within"]
