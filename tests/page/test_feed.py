"""The feed: whole once, then changes; made once for all; nothing kept for who does not read; an end for everybody."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from disagg_proxy.errors import Unavailable
from disagg_proxy.page.feed import Feed, changes, joined
from tests.conftest import soon

NOT_BY_ITSELF = 3600.0


def view(number: int) -> dict[str, Any]:
    """One that differs from the one before in everything that can."""
    return {
        "now": number,
        "recent": [{"seq": seq, "model": "m"} for seq in range(max(0, number - 3), number)],
        # The newest event takes over from one that goes, as those do that are counted.
        "events": [{"seq": 10}, {"seq": 100 + number, "count": number}],
        "rates": {
            "step_s": 5,
            "steps": [{"time": t, "n": number if t == number else 0} for t in range(number - 3, number + 1)],
        },
    }


class Source:
    """Makes a new view each time it is asked; ``tick`` lets the feed go on."""

    def __init__(self) -> None:
        self.made = 0
        self.fails = False

    async def __call__(self) -> dict[str, Any]:
        self.made += 1
        if self.fails:
            raise RuntimeError("no view")
        return view(self.made)


def parsed(message: bytes) -> tuple[str, Any]:
    event, data, *rest = message.decode().split("\n")
    assert rest == ["", ""]
    return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@pytest.fixture
async def ended() -> AsyncIterator[asyncio.Event]:
    event = asyncio.Event()
    yield event
    event.set()


async def read(messages: AsyncIterator[bytes]) -> tuple[str, Any]:
    return parsed(await soon(anext(messages)))


def test_changes_say_only_what_is_new_and_joined_makes_the_view_again() -> None:
    before = view(3)
    for number in range(4, 9):
        now = view(number)
        kept = copy.deepcopy(before)
        update = json.loads(json.dumps(changes(before, now)))
        assert before == kept and now == view(number), "neither is changed"
        assert [e["seq"] for e in update["events"]] == [100 + number]
        assert update["gone"] == {"recent": [number - 4] if number > 3 else [], "events": [99 + number]}
        assert len(update["recent"]) == 1
        assert {step["time"] for step in update["rates"]["steps"]} == {number - 1, number}
        before = joined(before, update)
        assert before == now


async def test_a_viewer_gets_the_whole_view_and_then_changes(ended) -> None:
    source = Source()
    feed = Feed(source, ended, interval=0.001)
    messages = feed.join().messages()
    kind, seen = await read(messages)
    assert (kind, seen) == ("view", view(1))
    for _ in range(3):
        kind, update = await read(messages)
        assert kind == "update"
        seen = joined(seen, update)
        assert seen == view(seen["now"])


async def test_one_view_is_made_for_all(ended) -> None:
    source = Source()
    feed = Feed(source, ended, interval=NOT_BY_ITSELF)
    streams = [feed.join().messages() for _ in range(5)]
    assert [await read(s) for s in streams] == [("view", view(1))] * 5
    assert source.made == 1
    late = feed.join().messages()
    assert await read(late) == ("view", view(1)), "one that comes later does not wait for the next"
    assert source.made == 1


async def test_a_viewer_that_was_away_gets_the_newest_view_whole(ended) -> None:
    source = Source()
    feed = Feed(source, ended, interval=0.001)
    slow, other = feed.join().messages(), feed.join().messages()
    await read(slow)
    while source.made < 6:
        await read(other)
    kind, seen = await read(slow)
    assert kind == "view" and seen["now"] >= 5


async def test_nothing_is_made_while_nobody_looks(ended) -> None:
    source = Source()
    feed = Feed(source, ended, interval=0.001)
    viewers = [feed.join(), feed.join()]
    await read(viewers[0].messages())
    viewers[0].leave()
    viewers[0].leave()
    assert len(feed.viewers) == 1
    viewers[1].leave()
    made = source.made
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert source.made == made and feed.state is None
    assert (await read(feed.join().messages()))[0] == "view", "and it goes on for the next"


async def test_there_are_no_more_viewers_than_may_be(ended) -> None:
    feed = Feed(Source(), ended, interval=NOT_BY_ITSELF, max_viewers=2)
    first = feed.join()
    feed.join()
    with pytest.raises(Unavailable, match="has 2 viewers already"):
        feed.join()
    first.leave()
    feed.join()


async def test_a_view_that_cannot_be_made_ends_nothing(ended, caplog) -> None:
    source = Source()
    feed = Feed(source, ended, interval=0.001)
    messages = feed.join().messages()
    await read(messages)
    source.fails = True
    made = source.made
    while source.made < made + 3:
        await asyncio.sleep(0.001)
    source.fails = False
    kind, _ = await read(messages)
    assert kind in ("update", "view")
    assert "Could not update the live page" in caplog.text


async def test_at_the_end_everybody_is_told(ended) -> None:
    feed = Feed(Source(), ended, interval=NOT_BY_ITSELF)
    messages = feed.join().messages()
    await read(messages)
    ended.set()
    assert await read(messages) == ("end", {})
    with pytest.raises(StopAsyncIteration):
        await soon(anext(messages))
