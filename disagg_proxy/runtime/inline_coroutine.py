"""Runs a coroutine without a task: each step runs inside the call that provides what the coroutine awaits.

A task needs one event loop iteration to start, one for each wait and one to end; for a small request that costs as
much as its JSON parsing. An :class:`InlineCoroutine` starts inside the call that creates it and resumes inside the call
that sets the :class:`Event` it awaits. It may await asyncio futures and tasks as well, but nothing that needs a current
task, such as ``asyncio.timeout``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final


class Event:
    """Awaited by at most one :class:`InlineCoroutine`, which resumes inside :meth:`set`."""

    __slots__ = ("_waiting", "is_set")

    def __init__(self) -> None:
        self._waiting: InlineCoroutine | None = None
        self.is_set = False

    def set(self) -> None:
        """Resume the coroutine that awaits this event. Further calls have no effect."""
        if self.is_set:
            return
        self.is_set = True
        if self._waiting is not None:
            self._waiting.resume()

    def __await__(self) -> Generator[Any, None, None]:
        if not self.is_set:
            yield self

    def resume_on_set(self, waiting: InlineCoroutine | None) -> None:
        """Register the coroutine that :meth:`set` resumes; None removes it."""
        self._waiting = waiting


class _Running:
    """What runs now. Not an attribute of the class: CPython drops what it has cached of a class that is changed.

    Attributes:
        coroutine: the one whose step is running; None inside a task or callback.
    """

    __slots__ = ("coroutine",)

    def __init__(self) -> None:
        self.coroutine: InlineCoroutine | None = None


RUNNING: Final = _Running()


class InlineCoroutine:
    """One coroutine that is stepped by its events.

    Args:
        work: the coroutine.
        ended: called once when it has ended, with the exception that ended it, if any.
    """

    __slots__ = ("_cancel_pending", "_ended", "_on", "_running", "_work")

    def __init__(
        self, work: Coroutine[Any, Any, Any], ended: Callable[[InlineCoroutine, BaseException | None], None]
    ) -> None:
        self._work = work
        self._ended = ended
        self._on: Event | asyncio.Future[Any] | None = None
        self._running = False
        self._cancel_pending = False

    def start(self) -> None:
        """Run the first step."""
        self._step(None)

    def cancel(self) -> None:
        """Raise CancelledError at the await point, within this call where that is an :class:`Event`.

        No effect after the end.
        """
        on = self._on
        if self._running:
            self._cancel_pending = True
        elif isinstance(on, Event):
            on.resume_on_set(None)
            self._step(asyncio.CancelledError())
        elif on is not None:
            on.cancel()

    def resume(self) -> None:
        """Run the next step: the awaited event is set."""
        self._step(None)

    def _future_done(self, future: asyncio.Future[Any]) -> None:
        # The future raises its own exception when the coroutine reads its result.
        self._step(None)

    def _step(self, error: BaseException | None) -> None:
        outer, RUNNING.coroutine = RUNNING.coroutine, self
        self._running, self._on = True, None
        try:
            on = self._work.send(None) if error is None else self._work.throw(error)
        except StopIteration:
            self._end(None)
        except BaseException as failure:
            self._end(failure)
            if isinstance(failure, (KeyboardInterrupt, SystemExit)):
                raise
        else:
            self._running = False
            self._wait_for(on)
        finally:
            RUNNING.coroutine = outer

    def _wait_for(self, on: Any) -> None:
        if type(on) is Event:
            self._on = on
            on.resume_on_set(self)
        elif on is None:
            # A bare yield, as of asyncio.sleep(0).
            asyncio.get_running_loop().call_soon(self.resume)
            return
        else:
            self._on = on
            on._asyncio_future_blocking = False
            on.add_done_callback(self._future_done)
        if self._cancel_pending:
            self._cancel_pending = False
            self.cancel()

    def _end(self, error: BaseException | None) -> None:
        self._running = False
        ended, self._ended = self._ended, _ignore
        ended(self, error)


def _ignore(coroutine: InlineCoroutine, error: BaseException | None) -> None:
    """The callback after the end, which has been reported."""
