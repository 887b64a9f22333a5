"""Reads the feed of a proxy over HTTP and applies its updates: yields each new view."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp

from disagg_proxy.page.feed import joined

PATH = "/dashboard/events"
IDLE_TIMEOUT = 15.0
"""Seconds without data after which the connection counts as dead: the proxy sends an event each second."""

_MIN_PAUSE, _MAX_PAUSE = 0.5, 5.0

View = dict[str, Any]


class FeedError(Exception):
    """The feed is not available; the message says why and what to do."""


class WrongKey(FeedError):
    """The proxy rejected the API key. Retrying does not help."""


class NoFeed(FeedError):
    """The server is not this proxy, or a version without the feed. Retrying does not help."""


async def views(url: str, key: str) -> AsyncIterator[View]:
    """Views until the proxy ends the feed.

    Args:
        url: of the proxy, with its path prefix if a reverse proxy adds one, without a trailing slash.
        key: API key, empty for none.

    Raises:
        FeedError: the feed is not available, or the connection was lost.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=IDLE_TIMEOUT)
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
        raise FeedError(f"{url} does not respond ({error or type(error).__name__})") from error


async def views_with_reconnect(url: str, key: str, gone: Callable[[str], None]) -> AsyncIterator[View]:
    """Views, reconnecting whenever the feed ends; ``gone`` is called with the reason before each pause.

    Raises:
        WrongKey, NoFeed: retrying does not help.
    """
    pause = _MIN_PAUSE
    while True:
        why = f"{url} is stopping"
        try:
            async for view in views(url, key):
                pause = _MIN_PAUSE
                yield view
        except (WrongKey, NoFeed):
            raise
        except FeedError as error:
            why = str(error)
        gone(why)
        await asyncio.sleep(pause)
        pause = min(_MAX_PAUSE, 2 * pause)


async def _check(answer: aiohttp.ClientResponse, url: str) -> None:
    if answer.status == 401:
        raise WrongKey(f"{url} requires its API key: pass --key, or set API_KEY")
    if answer.status == 403:
        raise WrongKey(f"{url} responded: {await _message(answer)}")
    if answer.status == 503:
        raise FeedError(f"{url} responded: {await _message(answer)}")
    if answer.status != 200 or answer.content_type != "text/event-stream":
        raise NoFeed(f"{url}{PATH} returned {answer.status}: not disagg-proxy, or a version without the live page")


async def _message(answer: aiohttp.ClientResponse) -> str:
    try:
        return str((await answer.json())["error"]["message"])
    except (ValueError, KeyError, TypeError, aiohttp.ContentTypeError):
        return f"status {answer.status}"


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[str, Any]]:
    """Parse events as page/feed.py writes them: one ``event`` and one ``data`` line each."""
    rest = b""
    async for chunk in content.iter_any():
        *blocks, rest = (rest + chunk).split(b"\n\n")
        for block in blocks:
            event, _, data = block.partition(b"\n")
            yield event.removeprefix(b"event: ").decode(), json.loads(data.removeprefix(b"data: "))
