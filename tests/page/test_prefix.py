"""The page behind a reverse proxy that serves it under a path prefix, which it strips: a small one, and nginx."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from disagg_proxy.top.follow import views
from tests import web_servers
from tests.page.browser import needs_browser
from tests.page.test_browser import says
from tests.ports import hold_port
from tests.web_servers import needs_nginx

Gateway = Callable[[str, str], AbstractAsyncContextManager[str]]


@asynccontextmanager
async def small(target: str, prefix: str) -> AsyncIterator[str]:
    """Serve ``target`` under ``prefix``, and nothing elsewhere. Yields the address."""

    async def forward(request: web.Request) -> web.StreamResponse:
        url = target + request.rel_url.raw_path.removeprefix(prefix)
        headers = {name: value for name, value in request.headers.items() if name not in ("Host", "Content-Length")}
        data = await request.read()
        async with (
            aiohttp.ClientSession(auto_decompress=False) as http,
            http.request(request.method, url, headers=headers, data=data, allow_redirects=False) as answer,
        ):
            kept = {name: v for name, v in answer.headers.items() if name not in ("Transfer-Encoding", "Connection")}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response

    app = web.Application()
    app.router.add_route("*", prefix + "/{rest:.*}", forward)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
def nginx(tmp_path: Path) -> Gateway:
    """The configuration of docs/page.md."""

    @asynccontextmanager
    async def serve(target: str, prefix: str) -> AsyncIterator[str]:
        with ExitStack() as hold:
            port = hold_port(hold)
            location = f"location {prefix}/ {{ proxy_pass {target}/; }}"
            async with web_servers.nginx(tmp_path, port, f"server {{ listen 127.0.0.1:{port}; {location} }}") as url:
                yield url

    return serve


@pytest.fixture(params=["small", pytest.param("nginx", marks=needs_nginx)])
def gateway(request: pytest.FixtureRequest) -> Gateway:
    return small if request.param == "small" else request.getfixturevalue("nginx")


@needs_browser
@pytest.mark.parametrize("prefix", ["/llm", "/x/y"])
@pytest.mark.parametrize("path", ["/", "/dashboard", "/dashboard/"])
async def test_the_page_its_feed_and_its_form_work_under_a_prefix(
    machine, pair, browser, gateway: Gateway, prefix: str, path: str
) -> None:
    prefill, _ = pair
    async with gateway(machine.proxy.url, prefix) as outside:
        page = await browser.open("about:blank")
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.url))
        await page.goto(outside + prefix + path)
        await says(page, "#now-text", "Serving: 1 pair ready")
        await says(page, "#link", "Live")
        await page.get_by_role("button", name="Send").click()
        await says(page, "#ask-route", f"Served by prefill {prefill.http_address}")
        await page.get_by_label("Route").select_option(label="Chat")
        await page.get_by_role("button", name="Send").click()
        await says(page, "#ask-status", re.compile("complete after"))
        paths = [urlsplit(url).path for url in sent if not url.startswith("data:")]
        feed, routes = f"{prefix}/dashboard/events", [f"{prefix}/v1/completions", f"{prefix}/v1/chat/completions"]
        assert [path for path in paths if "/v1/" in path] == routes and feed in paths
        assert all(url.startswith(outside + prefix) for url in sent if not url.startswith("data:")), sent
        assert len(machine.proxy.services.recorder.event_log.records) == 2
        await page.close()


@needs_browser
@pytest.mark.settings(api_key="sesame")
async def test_a_key_is_kept_for_its_prefix(machine, pair, browser) -> None:
    browser.expected.append("401")
    async with small(machine.proxy.url, "/x/y") as outside:
        page = await browser.open(f"{outside}/x/y/")
        await page.get_by_label("API key", exact=True).fill("sesame")
        await page.keyboard.press("Enter")
        await says(page, "#now-text", "Serving: 1 pair ready")
        await page.goto(f"{outside}/x/y/dashboard")
        await says(page, "#now-text", "Serving: 1 pair ready")
        keys = await page.evaluate("Object.keys(sessionStorage)")
        assert keys == ["disagg-proxy-key /x/y/"], "a proxy under another prefix of this origin does not get it"
        await page.close()


async def test_top_reads_the_feed_under_a_prefix(machine, pair, gateway: Gateway) -> None:
    async with gateway(machine.proxy.url, "/x/y") as outside:
        async for view in views(f"{outside}/x/y", ""):
            assert view["health"]["pairs"] == 1
            break
