"""The feed of the live page: server-sent events (HTML Living Standard, 9.2) with the current view of the proxy.

One view per second is made for all viewers of a process, none without a viewer. A viewer first gets the complete view
(``event: view``), then changes (``event: update``) from :func:`changes`; :func:`joined` and its counterpart in
``web/model.js`` apply them. Nothing is queued: a viewer that falls behind gets the newest complete view, and one that
does not read blocks in its own connection only. At shutdown each gets ``event: end``; viewers that do not read are
disconnected (``begin_shutdown`` in server/connection_lifecycle.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from disagg_proxy.errors import Unavailable
from disagg_proxy.runtime.within import within

log = logging.getLogger(__name__)

MAX_VIEWERS = 64
"""Open feeds per process."""

_END = b"event: end\ndata: {}\n\n"

_RINGS = ("recent", "events")
"""Lists of a view whose entries have a ``seq``."""

View = dict[str, Any]


class Viewer:
    """One open feed. Call :meth:`leave` at its end."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def messages(self) -> AsyncIterator[bytes]:
        """The events to send, until the proxy stops."""
        seen = -1
        while not self._feed.over:
            state = self._feed.state
            if state is None or state.number == seen:
                await self._feed.next_state()
                continue
            yield state.update if state.number == seen + 1 and seen >= 0 else state.complete
            seen = state.number
        yield _END

    def leave(self) -> None:
        """Close the feed. Idempotent."""
        self._feed.remove(self)


class Feed:
    """The viewers of this process.

    Args:
        view: makes a view, see ``Services.page_view``.
        ended: set when the proxy stops.
        interval: seconds between two views.
        max_viewers: concurrent viewers, :data:`MAX_VIEWERS` by default.

    Attributes:
        state: the newest view, None without viewers.
        over: whether the feed has ended.
        viewers: the open feeds.
    """

    def __init__(
        self,
        view: Callable[[], Awaitable[View]],
        ended: asyncio.Event,
        interval: float = 1.0,
        max_viewers: int | None = None,
    ) -> None:
        self.state: FeedState | None = None
        self.over = False
        self.viewers: set[Viewer] = set()
        self._view = view
        self._ended = ended
        self._interval = interval
        self._max_viewers = MAX_VIEWERS if max_viewers is None else max_viewers
        self._updated = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def join(self) -> Viewer:
        """Add a viewer.

        Raises:
            Unavailable: the limit of viewers is reached.
        """
        if len(self.viewers) >= self._max_viewers:
            raise Unavailable(
                f"The live page has {self._max_viewers} viewers already, which is the limit.", retry_after=10
            )
        viewer = Viewer(self)
        self.viewers.add(viewer)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return viewer

    def remove(self, viewer: Viewer) -> None:
        """Remove a viewer; without any the feed makes no views."""
        self.viewers.discard(viewer)
        if not self.viewers and self._task is not None and not self.over:
            self._task.cancel()
            self._task = self.state = None

    async def next_state(self) -> None:
        """Wait until there is a newer state, or the feed has ended."""
        await self._updated.wait()

    async def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.state = FeedState(await self._view(), self.state)
                self._notify()
            except Exception:
                log.exception("Could not update the live page")
            try:
                async with within(self._interval):
                    await self._ended.wait()
            except asyncio.TimeoutError:
                continue
        self.over = True
        self._notify()

    def _notify(self) -> None:
        self._updated.set()
        self._updated = asyncio.Event()


class FeedState:
    """One view and its events.

    Attributes:
        number: consecutive, from 0.
        update: the event for viewers that have the previous state.
    """

    def __init__(self, view: View, before: FeedState | None) -> None:
        self.number: int = 0 if before is None else before.number + 1
        self.view = view
        self.update = b"" if before is None else _message("update", changes(before.view, view))
        self._complete: bytes | None = None

    @property
    def complete(self) -> bytes:
        """The event for viewers without the previous state, made on first use."""
        if self._complete is None:
            self._complete = _message("view", self.view)
        return self._complete


def changes(before: View, view: View) -> View:
    """``view`` without the entries of ``recent``, ``events`` and ``rates`` that are unchanged since ``before``.

    ``gone`` has the ``seq`` of the entries that were removed.
    """
    update = dict(view)
    gone = update["gone"] = {}
    for ring in _RINGS:
        old = {entry["seq"] for entry in before[ring]}
        update[ring] = [entry for entry in view[ring] if entry["seq"] not in old]
        gone[ring] = sorted(old.difference(entry["seq"] for entry in view[ring]))
    steps = {step["time"]: step for step in before["rates"]["steps"]}
    update["rates"] = {
        **view["rates"],
        "steps": [step for step in view["rates"]["steps"] if steps.get(step["time"]) != step],
    }
    return update


def joined(before: View, update: View) -> View:
    """The view that ``update`` was made from by :func:`changes`."""
    view = dict(update)
    gone = view.pop("gone")
    for ring in _RINGS:
        left = [entry for entry in before[ring] if entry["seq"] not in gone[ring]]
        view[ring] = sorted([*left, *update[ring]], key=lambda entry: entry["seq"])
    old = before["rates"]["steps"]
    steps = {step["time"]: step for step in [*old, *update["rates"]["steps"]]}
    view["rates"] = {**update["rates"], "steps": [steps[time] for time in sorted(steps)][-len(old) :]}
    return view


def _message(event: str, value: View) -> bytes:
    return f"event: {event}\ndata: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
