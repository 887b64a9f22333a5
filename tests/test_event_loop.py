"""The clock of the tests' event loop (tests/event_loop.py): its stalls are no time, its waits are."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.event_loop import StallFreeLoop


def loop() -> StallFreeLoop:
    running = asyncio.get_running_loop()
    assert isinstance(running, StallFreeLoop)
    return running


async def test_a_stall_expires_no_timeout() -> None:
    event = asyncio.Event()

    def stalled() -> None:
        time.sleep(0.3)
        loop().call_later(0.01, event.set)

    loop().call_soon(stalled)
    await asyncio.wait_for(event.wait(), 0.2)


async def test_a_wait_is_as_long_as_on_the_host() -> None:
    began, there = time.monotonic(), loop().time()
    await asyncio.sleep(0.05)
    assert 0.05 <= loop().time() - there <= time.monotonic() - began + 0.01


async def test_without_events_a_timeout_expires() -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.Event().wait(), 0.02)


async def test_a_thread_is_heard_although_no_timer_is_due() -> None:
    assert await asyncio.to_thread(lambda: 7) == 7


async def test_advance_lets_timers_expire() -> None:
    event = asyncio.Event()
    loop().call_later(600, event.set)
    loop().advance(600)
    await asyncio.wait_for(event.wait(), 30)
