"""The grace time is counted once, from the beginning of the shutdown."""

import asyncio

import pytest

from disagg_proxy.runtime.shutdown import Shutdown
from tests.conftest import soon


@pytest.fixture
def time() -> list[float]:
    return [100.0]


@pytest.mark.parametrize(("grace", "for_requests"), [(30.0, 25.0), (10.0, 8.0), (0.5, 0.4), (600.0, 595.0)])
def test_a_fifth_and_at_most_five_seconds_are_reserved_for_background_work(
    time, grace: float, for_requests: float
) -> None:
    shutdown = Shutdown(grace, lambda: time[0])
    assert shutdown.remaining == grace and not shutdown.begun.is_set()
    time[0] += 50
    shutdown.begin()
    assert (shutdown.remaining, shutdown.remaining_for_requests) == (grace, pytest.approx(for_requests))
    time[0] += grace / 2
    shutdown.begin()
    assert shutdown.remaining == pytest.approx(grace / 2), "a second beginning adds nothing"
    assert shutdown.remaining_for_requests == pytest.approx(for_requests - grace / 2)
    time[0] += grace
    assert (shutdown.remaining, shutdown.remaining_for_requests) == (0.0, 0.0)


async def test_expiring_early_ends_every_wait(time) -> None:
    shutdown = Shutdown(600.0, lambda: time[0])
    shutdown.begin()
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    waiting = asyncio.create_task(shutdown.wait(work(), shutdown.remaining))
    await asyncio.sleep(0)
    shutdown.expire()
    await soon(waiting)
    assert ended.is_set() and shutdown.remaining == 0.0


async def test_a_wait_ends_with_the_work_or_with_the_time(time) -> None:
    shutdown = Shutdown(600.0, lambda: time[0])
    await soon(shutdown.wait(asyncio.sleep(0), 600.0))
    await soon(shutdown.wait(asyncio.sleep(600), 0.0))
