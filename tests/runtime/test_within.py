"""A time limit on an await, together with cancellation."""

from __future__ import annotations

import asyncio

import pytest

from disagg_kv.within import within as of_the_connector
from disagg_proxy.runtime.within import within as of_the_proxy
from tests.conftest import soon

both = pytest.mark.parametrize("within", [of_the_proxy, of_the_connector], ids=["proxy", "connector"])


@both
async def test_a_task_that_is_cancelled_as_its_wait_completes_ends(within) -> None:
    loop = asyncio.get_running_loop()
    over, never = loop.create_future(), loop.create_future()

    async def work() -> None:
        async with within(60):
            await over
        await never

    task = loop.create_task(work())
    await asyncio.sleep(0)
    over.set_result(None)
    task.cancel()
    await soon(asyncio.gather(task, return_exceptions=True))
    assert task.cancelled()


@both
async def test_a_wait_that_takes_too_long_raises_timeout_error(within) -> None:
    with pytest.raises(asyncio.TimeoutError):
        async with within(0.001):
            await asyncio.get_running_loop().create_future()
