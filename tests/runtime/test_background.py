"""Work that outlives its client."""

import asyncio

from disagg_proxy.runtime.background import Background
from tests.conftest import soon


async def test_work_continues_when_the_task_that_started_it_is_cancelled() -> None:
    background, go, done = Background(), asyncio.Event(), []

    async def work() -> None:
        await go.wait()
        done.append(True)

    async def begin() -> None:
        await asyncio.shield(background.spawn(work(), "work"))

    begun = asyncio.create_task(begin())
    await asyncio.sleep(0)
    begun.cancel()
    await asyncio.gather(begun, return_exceptions=True)
    assert len(background) == 1
    go.set()
    await soon(background.ended())
    assert done and len(background) == 0


async def test_a_failure_is_logged_with_its_name(caplog) -> None:
    background = Background()

    async def work() -> None:
        raise ValueError("no")

    await asyncio.gather(background.spawn(work(), "drain 7"), return_exceptions=True)
    await asyncio.sleep(0)
    assert "drain 7 failed" in caplog.text and "ValueError: no" in caplog.text
    assert len(background) == 0


async def test_cancel_all_cancels_running_work(caplog) -> None:
    background = Background()
    task = background.spawn(asyncio.Event().wait(), "hangs")
    await background.cancel_all()
    assert task.cancelled() and len(background) == 0
    assert "Cancelled 1 background requests: the grace time" in caplog.text
    assert "failed" not in caplog.text


async def test_ended_waits_for_work_started_by_other_work() -> None:
    background, go, done = Background(), asyncio.Event(), []

    async def drain() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        done.append(True)

    async def request() -> None:
        await go.wait()
        background.spawn(drain(), "drain")

    background.spawn(request(), "request")
    asyncio.get_running_loop().call_soon(go.set)
    await soon(background.ended())
    assert done
