"""What the open pages are told, as server-sent events (HTML Living Standard, 9.2).

One view a second is made for all viewers together, and none while nobody looks. A viewer gets the whole view once
(``event: view``), then what has changed (``event: update``): :func:`changes` says how, and whoever reads the feed puts
it together again with :func:`joined` or its like in ``web/model.js``. Nothing is queued for a viewer: one that comes
late gets the newest view whole, and one that reads nothing is left waiting in its own connection. At the end each gets
``event: end``, and who is not reading then is dropped (``begin_shutdown`` in server/connection_lifecycle.py).
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

MOST_VIEWERS = 64
"""Open feeds of one process."""

_END = b"event: end\ndata: {}\n\n"

_RINGS = ("recent", "events")
"""Parts of a view that grow by entries with a ``seq``."""

View = dict[str, Any]


class Viewer:
    """One open feed. It must be told to ``leave`` in the end."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def messages(self) -> AsyncIterator[bytes]:
        """What to send, as it comes about, until the proxy stops."""
        seen = -1
        while not self._feed.over:
            moment = self._feed.moment
            if moment is None or moment.number == seen:
                await self._feed.news()
                continue
            yield moment.update if moment.number == seen + 1 and seen >= 0 else moment.whole
            seen = moment.number
        yield _END

    def leave(self) -> None:
        """It is over; harmless the second time."""
        self._feed.left(self)


class Feed:
    """The viewers of this process.

    Args:
        view: makes a view, as ``Services.view`` does.
        ended: set when the proxy stops.
        every: seconds between two views.
        most: viewers at once, MOST_VIEWERS when left out.
    """

    def __init__(
        self, view: Callable[[], Awaitable[View]], ended: asyncio.Event, every: float = 1.0, most: int | None = None
    ) -> None:
        self.moment: FeedState | None = None
        self.over = False
        self.viewers: set[Viewer] = set()
        self._view = view
        self._ended = ended
        self._every = every
        self._most = MOST_VIEWERS if most is None else most
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def join(self) -> Viewer:
        """A new viewer.

        Raises:
            Unavailable: there are as many as there may be.
        """
        if len(self.viewers) >= self._most:
            raise Unavailable(f"The live page is open {self._most} times already.", retry_after=10)
        viewer = Viewer(self)
        self.viewers.add(viewer)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return viewer

    def left(self, viewer: Viewer) -> None:
        """It watches no more."""
        self.viewers.discard(viewer)
        if not self.viewers and self._task is not None and not self.over:
            self._task.cancel()
            self._task = self.moment = None

    async def news(self) -> None:
        """Until there is a newer moment, or the end."""
        await self._news.wait()

    async def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.moment = FeedState(await self._view(), self.moment)
                self._tell()
            except Exception:
                log.exception("The live page cannot be brought up to date")
            try:
                async with within(self._every):
                    await self._ended.wait()
            except asyncio.TimeoutError:
                continue
        self.over = True
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class FeedState:
    """One view, and how it is sent.

    Attributes:
        number: counts up by one.
        update: for who has the one before.
    """

    def __init__(self, view: View, before: FeedState | None) -> None:
        self.number: int = 0 if before is None else before.number + 1
        self.view = view
        self.update = b"" if before is None else _message("update", changes(before.view, view))
        self._whole: bytes | None = None

    @property
    def whole(self) -> bytes:
        """For who has none; made when somebody asks."""
        if self._whole is None:
            self._whole = _message("view", self.view)
        return self._whole


def changes(before: View, view: View) -> View:
    """``view`` without the entries of ``recent``, ``events`` and ``rates`` that are in ``before`` as they are; ``gone``
    has the numbers of those that are no longer there."""
    short = dict(view)
    gone = short["gone"] = {}
    for ring in _RINGS:
        old = {entry["seq"] for entry in before[ring]}
        short[ring] = [entry for entry in view[ring] if entry["seq"] not in old]
        gone[ring] = sorted(old.difference(entry["seq"] for entry in view[ring]))
    steps = {step["time"]: step for step in before["rates"]["steps"]}
    short["rates"] = {
        **view["rates"],
        "steps": [step for step in view["rates"]["steps"] if steps.get(step["time"]) != step],
    }
    return short


def joined(before: View, update: View) -> View:
    """The view that ``update`` was made from."""
    whole = dict(update)
    gone = whole.pop("gone")
    for ring in _RINGS:
        left = [entry for entry in before[ring] if entry["seq"] not in gone[ring]]
        whole[ring] = sorted([*left, *update[ring]], key=lambda entry: entry["seq"])
    old = before["rates"]["steps"]
    steps = {step["time"]: step for step in [*old, *update["rates"]["steps"]]}
    whole["rates"] = {**update["rates"], "steps": [steps[time] for time in sorted(steps)][-len(old) :]}
    return whole


def _message(event: str, value: View) -> bytes:
    return f"event: {event}\ndata: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
