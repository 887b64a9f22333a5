"""Runs a coroutine without a task: its steps are taken at once, in whatever call brings what it waits for.

A task needs a turn of the event loop to begin, one for each wait, and one to end; for a small request they cost as
much as its whole JSON. Here a coroutine begins in the call that starts it and goes on in the call in which an engine's
answer arrives (:class:`Moment`). It may await anything of asyncio's as well, except what asks for the current task,
such as ``asyncio.timeout``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any, ClassVar


class Moment:
    """Awaited by a coroutine that runs in :class:`Steps`, until somebody says :meth:`come`."""

    __slots__ = ("_over", "_waiting")

    def __init__(self) -> None:
        self._waiting: Steps | None = None
        self._over = False

    def come(self) -> None:
        """Whoever awaits it goes on now; only the first call counts."""
        if self._over:
            return
        self._over = True
        if self._waiting is not None:
            self._waiting.go_on()

    def __await__(self) -> Generator[Any, None, None]:
        if not self._over:
            yield self

    def call(self, waiting: Steps | None) -> None:
        """Who goes on then."""
        self._waiting = waiting


class Steps:
    """One coroutine on its way.

    Args:
        ended: called once, with the exception that it ended with, if any.
    """

    __slots__ = ("_ended", "_on", "_running", "_to_cancel", "_work")

    running: ClassVar[Steps | None] = None
    """Whose step is being taken, None where an ordinary task runs."""

    def __init__(self, work: Coroutine[Any, Any, Any], ended: Callable[[Steps, BaseException | None], None]) -> None:
        self._work = work
        self._ended = ended
        self._on: Moment | asyncio.Future[Any] | None = None
        self._running = False
        self._to_cancel = False

    def begin(self) -> None:
        """Take the first step."""
        self._step(None)

    def cancel(self) -> None:
        """Raise CancelledError where it waits; harmless when it has ended."""
        on = self._on
        if self._running:
            self._to_cancel = True
        elif isinstance(on, Moment):
            on.call(None)
            self._step(asyncio.CancelledError())
        elif on is not None:
            on.cancel()

    def go_on(self) -> None:
        """Take the next step: what it waited for is there."""
        self._step(None)

    def _woken(self, future: asyncio.Future[Any]) -> None:
        # The future itself raises, when it is asked for its result.
        self._step(None)

    def _step(self, error: BaseException | None) -> None:
        before, Steps.running = Steps.running, self
        self._running, self._on = True, None
        try:
            on = self._work.send(None) if error is None else self._work.throw(error)
        except StopIteration:
            self._over(None)
        except BaseException as failure:
            self._over(failure)
            if isinstance(failure, (KeyboardInterrupt, SystemExit)):
                raise
        else:
            self._running = False
            self._await(on)
        finally:
            Steps.running = before

    def _await(self, on: Any) -> None:
        if type(on) is Moment:
            self._on = on
            on.call(self)
        elif on is None:
            # A bare yield, as of asyncio.sleep(0).
            asyncio.get_running_loop().call_soon(self.go_on)
            return
        else:
            self._on = on
            on._asyncio_future_blocking = False
            on.add_done_callback(self._woken)
        if self._to_cancel:
            self._to_cancel = False
            self.cancel()

    def _over(self, error: BaseException | None) -> None:
        self._running = False
        ended, self._ended = self._ended, _nobody
        ended(self, error)


def _nobody(steps: Steps, error: BaseException | None) -> None:
    """Whoever was to be told was told."""
