"""Many timeouts of one length."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from disagg_proxy.runtime import fixed_timeouts
from disagg_proxy.runtime.fixed_timeouts import FixedTimeouts
from tests.conftest import soon


class Handle:
    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when, self.call = when, call


class Loop:
    """A clock that the test moves, with its timers."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[Handle] = []
        self.failures: list[dict[str, object]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> Handle:
        assert when > self.now
        self.timers.append(Handle(when, call))
        return self.timers[-1]

    def call_exception_handler(self, context: dict[str, object]) -> None:
        self.failures.append(context)

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [timer for timer in self.timers if timer.when <= end]:
            timer = min(due, key=lambda one: one.when)
            self.timers.remove(timer)
            self.now = timer.when
            timer.call()
        self.now = end


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(fixed_timeouts.asyncio, "get_running_loop", lambda: loop)
    return loop


def test_each_expires_in_time_with_one_timer_for_all(loop: Loop) -> None:
    waits, called = FixedTimeouts(5.0), []
    for number in range(4):
        waits.add(lambda number=number: called.append((number, loop.now)))
        assert len(loop.timers) == 1
        loop.pass_time(1.0)
    assert len(waits) == 4
    loop.pass_time(10.0)
    assert called == [(number, 105.0 + number) for number in range(4)]
    assert len(waits) == 0 and not loop.timers


def test_timeouts_of_one_instant_expire_together(loop: Loop) -> None:
    waits, called = FixedTimeouts(5.0), []
    for number in range(3):
        waits.add(lambda number=number: called.append(number))
    loop.pass_time(5.0)
    assert called == [0, 1, 2]


@pytest.mark.parametrize("dropped", range(3))
def test_a_dropped_timeout_is_not_called_and_delays_no_other(loop: Loop, dropped: int) -> None:
    waits, called = FixedTimeouts(5.0), []
    keys = []
    for number in range(3):
        keys.append(waits.add(lambda number=number: called.append((number, loop.now))))
        loop.pass_time(1.0)
    waits.drop(keys[dropped])
    waits.drop(keys[dropped])
    assert len(waits) == 2
    loop.pass_time(10.0)
    assert called == [(number, 105.0 + number) for number in range(3) if number != dropped]


def test_no_entry_remains_when_all_are_dropped_and_the_next_are_in_time(loop: Loop) -> None:
    waits, called = FixedTimeouts(5.0), []
    waits.drop(waits.add(lambda: called.append("dropped")))
    loop.pass_time(3.0)
    waits.add(lambda: called.append(loop.now))
    loop.pass_time(4.0)
    assert not called
    loop.pass_time(2.0)
    assert called == [108.0] and not loop.timers


def test_dropping_an_expired_or_unknown_timeout_has_no_effect(loop: Loop) -> None:
    waits, called = FixedTimeouts(5.0), []
    key = waits.add(lambda: called.append(1))
    loop.pass_time(5.0)
    waits.drop(key)
    waits.drop(None)
    assert called == [1] and len(waits) == 0


def test_a_callback_may_add_and_drop_timeouts(loop: Loop) -> None:
    waits, called = FixedTimeouts(5.0), []
    second: object | None = None

    def first() -> None:
        called.append(("first", loop.now))
        waits.drop(second)
        waits.add(lambda: called.append(("third", loop.now)))

    waits.add(first)
    second = waits.add(lambda: called.append(("second", loop.now)))
    loop.pass_time(20.0)
    assert called == [("first", 105.0), ("third", 110.0)]


def test_a_failing_callback_does_not_stop_the_others(loop: Loop) -> None:
    waits, called = FixedTimeouts(5.0), []

    def fail() -> None:
        raise RuntimeError("no")

    waits.add(fail)
    waits.add(lambda: called.append(1))
    loop.pass_time(1.0)
    waits.add(lambda: called.append(2))
    loop.pass_time(5.0)
    assert called == [1, 2]
    assert [str(context["exception"]) for context in loop.failures] == ["no"]


async def test_on_a_real_loop() -> None:
    waits, called = FixedTimeouts(0.02), asyncio.Event()
    waits.add(called.set)
    await soon(called.wait())
    assert len(waits) == 0
