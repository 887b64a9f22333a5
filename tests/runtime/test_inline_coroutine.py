"""Coroutines that run without a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from disagg_proxy.runtime.inline_coroutine import RUNNING, Event, InlineCoroutine
from tests.conftest import soon


class Run:
    """The recorded end of one coroutine."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self.ends: list[BaseException | None] = []
        self.over = asyncio.Event()
        self.coroutine = InlineCoroutine(work, self._ended)

    def _ended(self, coroutine: InlineCoroutine, error: BaseException | None) -> None:
        assert coroutine is self.coroutine
        self.ends.append(error)
        self.over.set()


def started(work: Coroutine[Any, Any, Any]) -> Run:
    run = Run(work)
    run.coroutine.start()
    return run


async def test_it_starts_at_once_and_resumes_inside_set() -> None:
    said: list[str] = []
    moment = Event()

    async def work() -> None:
        said.append("started")
        await moment
        said.append("resumed")

    run = started(work())
    assert said == ["started"] and not run.ends
    moment.set()
    assert said == ["started", "resumed"] and run.ends == [None]
    moment.set()
    assert run.ends == [None]


async def test_an_event_that_is_set_is_not_waited_for() -> None:
    moment = Event()
    moment.set()

    async def work() -> None:
        await moment

    assert started(work()).ends == [None]


async def test_asyncio_futures_and_tasks_can_be_awaited() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    got: list[Any] = []

    async def work() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        got.append(await future)
        got.append(await asyncio.create_task(asyncio.sleep(0, "task")))

    run = started(work())
    future.set_result(7)
    await soon(run.over.wait())
    assert got == [7, "task"] and run.ends == [None]


async def test_an_awaited_failure_is_raised_where_it_is_awaited() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        with pytest.raises(KeyError):
            await future
        raise ValueError("mine")

    run = started(work())
    future.set_exception(KeyError())
    await soon(run.over.wait())
    assert len(run.ends) == 1 and isinstance(run.ends[0], ValueError)


def on_a_moment() -> Coroutine[Any, Any, None]:
    async def work() -> None:
        await Event()

    return work()


@pytest.mark.parametrize("make", [on_a_moment, lambda: asyncio.sleep(60), asyncio.Event().wait])
async def test_cancel_raises_at_the_await_point(make: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    tidied: list[bool] = []

    async def work() -> None:
        try:
            await make()
        finally:
            tidied.append(True)

    run = started(work())
    run.coroutine.cancel()
    await soon(run.over.wait())
    assert tidied and isinstance(run.ends[0], asyncio.CancelledError)
    run.coroutine.cancel()
    assert len(run.ends) == 1


async def test_an_event_set_after_the_cancellation_resumes_nothing() -> None:
    moment, later = Event(), Event()

    async def work() -> None:
        try:
            await moment
        except asyncio.CancelledError:
            await later

    run = started(work())
    run.coroutine.cancel()
    moment.set()
    assert not run.ends
    later.set()
    assert run.ends == [None]


async def test_a_coroutine_that_cancels_itself_ends_at_its_next_await() -> None:
    said: list[str] = []

    async def work() -> None:
        run.coroutine.cancel()
        said.append("goes on")
        await Event()
        said.append("never")

    run = Run(work())
    run.coroutine.start()
    assert said == ["goes on"] and isinstance(run.ends[0], asyncio.CancelledError)


async def test_current_is_restored_after_a_nested_step() -> None:
    seen: list[InlineCoroutine | None] = []

    async def inner() -> None:
        seen.append(RUNNING.coroutine)

    async def outer() -> None:
        seen.append(RUNNING.coroutine)
        within = started(inner())
        seen.append(within.coroutine)
        seen.append(RUNNING.coroutine)

    run = started(outer())
    assert seen == [run.coroutine, seen[2], seen[2], run.coroutine] and seen[2] is not run.coroutine
    assert RUNNING.coroutine is None
