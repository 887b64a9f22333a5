"""The feed of a proxy, read over HTTP and put together: a view each time there is a newer one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp

from disagg_proxy.page.feed import joined

PATH = "/dashboard/events"
SILENCE = 15.0
"""Seconds without a word after which a proxy is taken to be gone: it says something each second."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0

View = dict[str, Any]


class FeedError(Exception):
    """There is no feed; the text says why and what to do."""


class WrongKey(FeedError):
    """The proxy asks for another key; waiting will not help."""


class NoFeed(FeedError):
    """Somebody answers who is not this proxy, or an older one; waiting will not help."""


async def views(url: str, key: str) -> AsyncIterator[View]:
    """Views until the proxy ends the feed.

    Args:
        url: of the proxy, without a path. key: for Authorization; none where it is empty.

    Raises:
        FeedError: there are none, or no more.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENCE)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=False) as http,
            http.get(url + PATH, headers=headers) as answer,
        ):
            await _check(answer, url)
            view: View | None = None
            async for event, data in _events(answer.content):
                if event == "view":
                    view = data
                elif event == "update" and view is not None:
                    view = joined(view, data)
                elif event == "end":
                    return
                if view is not None:
                    yield view
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        raise FeedError(f"{url} does not answer ({error or type(error).__name__})") from error


async def views_for_ever(url: str, key: str, gone: Callable[[str], None]) -> AsyncIterator[View]:
    """The same, again and again; ``gone`` is told why while there are none.

    Raises:
        WrongKey, NoFeed: waiting will not help.
    """
    pause = _SHORTEST_PAUSE
    while True:
        why = f"{url} is stopping"
        try:
            async for view in views(url, key):
                pause = _SHORTEST_PAUSE
                yield view
        except (WrongKey, NoFeed):
            raise
        except FeedError as error:
            why = str(error)
        gone(why)
        await asyncio.sleep(pause)
        pause = min(_LONGEST_PAUSE, 2 * pause)


async def _check(answer: aiohttp.ClientResponse, url: str) -> None:
    if answer.status == 401:
        raise WrongKey(f"{url} asks for its API key: give it as --key, or in the environment as API_KEY")
    if answer.status == 503:
        raise FeedError(f"{url} says: {await _message(answer)}")
    if answer.status != 200 or answer.content_type != "text/event-stream":
        raise NoFeed(f"{url}{PATH} answers {answer.status}: this is not the proxy, or one without the live page")


async def _message(answer: aiohttp.ClientResponse) -> str:
    try:
        return str((await answer.json())["error"]["message"])
    except (ValueError, KeyError, TypeError, aiohttp.ContentTypeError):
        return f"status {answer.status}"


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[str, Any]]:
    """As page/feed.py writes them: one line of each field."""
    rest = b""
    async for piece in content.iter_any():
        *blocks, rest = (rest + piece).split(b"\n\n")
        for block in blocks:
            event, _, data = block.partition(b"\n")
            yield event.removeprefix(b"event: ").decode(), json.loads(data.removeprefix(b"data: "))
