"""Coroutines that run without a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from disagg_proxy.runtime.inline_coroutine import Event, InlineCoroutine
from tests.conftest import soon


class Run:
    """What became of one coroutine."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self.ends: list[BaseException | None] = []
        self.over = asyncio.Event()
        self.coroutine = InlineCoroutine(work, self._ended)

    def _ended(self, coroutine: InlineCoroutine, error: BaseException | None) -> None:
        assert coroutine is self.coroutine
        self.ends.append(error)
        self.over.set()


def begun(work: Coroutine[Any, Any, Any]) -> Run:
    run = Run(work)
    run.coroutine.start()
    return run


async def test_it_begins_at_once_and_goes_on_in_the_very_call() -> None:
    said: list[str] = []
    moment = Event()

    async def work() -> None:
        said.append("begun")
        await moment
        said.append("came")

    run = begun(work())
    assert said == ["begun"] and not run.ends
    moment.set()
    assert said == ["begun", "came"] and run.ends == [None]
    moment.set()
    assert run.ends == [None]


async def test_a_moment_that_has_come_is_not_waited_for() -> None:
    moment = Event()
    moment.set()

    async def work() -> None:
        await moment

    assert begun(work()).ends == [None]


async def test_what_asyncio_has_can_be_awaited() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    got: list[Any] = []

    async def work() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        got.append(await future)
        got.append(await asyncio.create_task(asyncio.sleep(0, "task")))

    run = begun(work())
    future.set_result(7)
    await soon(run.over.wait())
    assert got == [7, "task"] and run.ends == [None]


async def test_an_awaited_failure_is_raised_where_it_is_awaited() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        with pytest.raises(KeyError):
            await future
        raise ValueError("mine")

    run = begun(work())
    future.set_exception(KeyError())
    await soon(run.over.wait())
    assert len(run.ends) == 1 and isinstance(run.ends[0], ValueError)


def on_a_moment() -> Coroutine[Any, Any, None]:
    async def work() -> None:
        await Event()

    return work()


@pytest.mark.parametrize("make", [on_a_moment, lambda: asyncio.sleep(60), asyncio.Event().wait])
async def test_cancelled_it_ends_where_it_waits(make: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    tidied: list[bool] = []

    async def work() -> None:
        try:
            await make()
        finally:
            tidied.append(True)

    run = begun(work())
    run.coroutine.cancel()
    await soon(run.over.wait())
    assert tidied and isinstance(run.ends[0], asyncio.CancelledError)
    run.coroutine.cancel()
    assert len(run.ends) == 1


async def test_a_moment_that_comes_after_the_cancellation_wakes_nobody() -> None:
    moment, later = Event(), Event()

    async def work() -> None:
        try:
            await moment
        except asyncio.CancelledError:
            await later

    run = begun(work())
    run.coroutine.cancel()
    moment.set()
    assert not run.ends
    later.set()
    assert run.ends == [None]


async def test_cancelled_by_itself_it_ends_at_its_next_wait() -> None:
    said: list[str] = []

    async def work() -> None:
        run.coroutine.cancel()
        said.append("goes on")
        await Event()
        said.append("never")

    run = Run(work())
    run.coroutine.start()
    assert said == ["goes on"] and isinstance(run.ends[0], asyncio.CancelledError)


async def test_who_is_running_is_known_also_within_another() -> None:
    seen: list[InlineCoroutine | None] = []

    async def inner() -> None:
        seen.append(InlineCoroutine.current)

    async def outer() -> None:
        seen.append(InlineCoroutine.current)
        within = begun(inner())
        seen.append(within.coroutine)
        seen.append(InlineCoroutine.current)

    run = begun(outer())
    assert seen == [run.coroutine, seen[2], seen[2], run.coroutine] and seen[2] is not run.coroutine
    assert InlineCoroutine.current is None
