"""Following a proxy: its feed, its key, its end and its return."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from disagg_proxy.top.follow import FeedError, NoFeed, WrongKey, views, views_with_reconnect
from tests.conftest import running_proxy, soon
from tests.simulated import REQUESTS

PATH = "/v1/completions"


async def test_updates_make_the_view_that_the_proxy_has(machine, pair) -> None:
    seen = views(machine.proxy.url, "")
    view = await soon(anext(seen))
    assert view["recent"] == [] and view["health"]["pairs"] == 1
    for _ in range(3):
        await machine.post(PATH, REQUESTS[PATH])
    while len(view["recent"]) < 3:
        view = await soon(anext(seen))
    whole = await machine.proxy.services.page_view()
    assert view["recent"] == whole["recent"] and view["events"] == whole["events"]
    assert "gone" not in view
    await seen.aclose()


@pytest.mark.settings(api_key="sesame")
async def test_the_key(machine) -> None:
    for key in "", "wrong":
        with pytest.raises(WrongKey, match="requires its API key: pass --key, or set API_KEY"):
            await soon(anext(views(machine.proxy.url, key)))
        with pytest.raises(WrongKey):
            await soon(anext(views_with_reconnect(machine.proxy.url, key, lambda why: None)))
    seen = views(machine.proxy.url, "sesame")
    assert (await soon(anext(seen)))["instances"] == []
    await seen.aclose()


async def test_nobody_answers() -> None:
    with pytest.raises(FeedError, match=r"http://127\.0\.0\.1:9 does not respond"):
        await soon(anext(views("http://127.0.0.1:9", "")))


@pytest.mark.parametrize("status", [200, 404, 500])
async def test_somebody_else_answers(status: int) -> None:
    async def other(request: web.Request) -> web.Response:
        return web.json_response({}, status=status)

    app = web.Application()
    app.router.add_get("/{path:.*}", other)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        with pytest.raises(NoFeed, match=f"returned {status}: not disagg-proxy"):
            await soon(anext(views_with_reconnect(f"http://127.0.0.1:{port}", "", lambda why: None)))
    finally:
        await runner.cleanup()


async def test_the_proxys_message_about_too_many_viewers_is_shown(monkeypatch) -> None:
    monkeypatch.setattr("disagg_proxy.page.feed.MAX_VIEWERS", 0)
    async with running_proxy() as proxy:
        with pytest.raises(FeedError, match="The live page has 0 viewers already"):
            await soon(anext(views(proxy.url, "")))


async def test_the_proxy_goes_and_comes_back(monkeypatch) -> None:
    monkeypatch.setattr("disagg_proxy.top.follow._MIN_PAUSE", 0.01)
    monkeypatch.setattr("disagg_proxy.top.follow._MAX_PAUSE", 0.05)
    told: asyncio.Queue[str] = asyncio.Queue()

    async def follow(url: str) -> None:
        async for view in views_with_reconnect(url, "", told.put_nowait):
            told.put_nowait(view["health"]["status"])

    async def until(text: str) -> None:
        while text not in await soon(told.get()):
            pass

    async with running_proxy() as proxy:
        following = asyncio.create_task(follow(proxy.url))
        await until("unavailable")
    await until(f"{proxy.url} is stopping")
    await until("does not respond")
    async with running_proxy(http_port=int(proxy.url.rpartition(":")[2])):
        await until("unavailable")
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_a_proxy_that_sends_nothing_counts_as_gone(machine, monkeypatch) -> None:
    monkeypatch.setattr("disagg_proxy.top.follow.IDLE_TIMEOUT", 0.2)

    seen = views(machine.proxy.url, "")
    await soon(anext(seen))

    async def never() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(machine.proxy.services, "page_view", never)
    with pytest.raises(FeedError, match="does not respond"):
        while True:
            await soon(anext(seen))
