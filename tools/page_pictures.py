"""Take the pictures of the live page in docs/img: ``python -m tools.page_pictures``, about three minutes.

Starts a proxy and four simulated engines on their default ports (10001, 20003 to 20006), sends requests, stalls a
decode, and photographs the page with the system's Chromium. Needs requirements-dev.txt and a Chinese font; pngquant,
where it is on PATH, makes the files smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from playwright.async_api import Page, async_playwright

from disagg_sim import SimConfig, SimEngine

URL, REGISTRATION = "http://127.0.0.1:10001", "127.0.0.1:30001"
PLACES = {"prefill": (20003, 20004), "decode": (20005, 20006)}
MODEL = "Qwen3-4B"
LEAVING = 0.04
"""Share of the requests whose client leaves early, and of those with a wrong model."""


class Stage:
    """A proxy, its engines and a load, on this machine."""

    def __init__(self, http: aiohttp.ClientSession, engines: dict[str, list[SimEngine]]) -> None:
        self.http = http
        self.engines = engines

    async def view(self) -> dict[str, Any]:
        """The body of /stats; empty while the proxy does not answer."""
        with contextlib.suppress(aiohttp.ClientError):
            async with self.http.get(f"{URL}/stats") as answer:
                return dict(await answer.json())
        return {}

    async def until(self, true: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until the body of /stats satisfies a condition."""
        for _ in range(300):
            if (view := await self.view()) and true(view):
                return
            await asyncio.sleep(0.2)
        raise TimeoutError(view)

    async def ask(self) -> None:
        """One request of a random kind."""
        chat = random.random() < 0.4
        words = " ".join(random.choices("water light stone river house".split(), k=random.randint(20, 900)))
        body: dict[str, Any] = {"messages": [{"role": "user", "content": words}]} if chat else {"prompt": words}
        body |= {"model": "Qwen3-8B" if random.random() < LEAVING else MODEL, "stream": random.random() < 0.8}
        body["max_tokens"] = random.choice((8, 24, 60, 120))
        timeout = aiohttp.ClientTimeout(total=0.3 if random.random() < LEAVING else 60)
        path = "/v1/chat/completions" if chat else "/v1/completions"
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
            async with self.http.post(URL + path, json=body, timeout=timeout) as answer:
                await answer.read()

    async def load(self, per_second: float) -> None:
        """Requests at random times, until cancelled."""
        sent: set[asyncio.Task[None]] = set()
        try:
            while True:
                sent.add(one := asyncio.create_task(self.ask()))
                one.add_done_callback(sent.discard)
                await asyncio.sleep(random.expovariate(per_second))
        finally:
            for one in sent:
                one.cancel()


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """Two prefills and two decodes behind a proxy that finds stalls within seconds."""
    environ = {**os.environ, "FREEZE_AFTER_MIN": "2", "FREEZE_AFTER_MAX": "6", "PROBE_INTERVAL": "1"}
    command = [sys.executable, "-m", "disagg_proxy", "--http-host", "127.0.0.1", "--kv-bytes-per-token", "147456"]
    proxy = await asyncio.create_subprocess_exec(*command, env=environ, stderr=asyncio.subprocess.DEVNULL)
    speed = {"prefill_tokens_per_second": 6000.0, "time_per_output_token": 0.02, "models": (MODEL,)}
    engines = {
        role: [
            SimEngine(SimConfig(role=role, port=port, proxy=REGISTRATION, ping_seconds=0.5, **speed))  # type: ignore[arg-type]
            for port in ports
        ]
        for role, ports in PLACES.items()
    }
    every = [engine for side in engines.values() for engine in side]
    async with aiohttp.ClientSession() as http:
        try:
            await asyncio.gather(*(engine.start() for engine in every))
            started = Stage(http, engines)
            await started.until(lambda view: view["health"]["pairs"] == 4)
            yield started
        finally:
            proxy.terminate()
            await proxy.wait()
            await asyncio.gather(*(engine.stop() for engine in every))


async def send(page: Page) -> None:
    """Send the form "Try it" and wait for the end of the response."""
    await page.locator("#ask-send").click()
    await page.locator("#ask-route:not(:empty)").wait_for()


async def frozen(on: Stage, shots: Shots) -> None:
    """A decode is frozen and needs a restart; the other one serves."""
    await asyncio.sleep(30)
    decode = on.engines["decode"][1]
    with decode.faults.held("schedule"):
        await on.until(lambda view: any(i["restart_wanted"] for i in view["instances"]))
        await asyncio.sleep(20)
        await shots.take("page-frozen", {"width": 1400, "height": 1180})


async def recovered(on: Stage, shots: Shots) -> None:
    """A decode has recovered by replays."""
    await asyncio.sleep(30)
    decode = on.engines["decode"][1]
    decode.faults.lose_kv(2)
    await on.until(lambda view: any(i["freezes"] for i in view["instances"]))
    await on.until(lambda view: all(i["state"] == "ready" for i in view["instances"]))
    await asyncio.sleep(20)
    await shots.take("page-dark", {"width": 1400, "height": 900}, whole=True, act=send, color_scheme="dark")
    await shots.take("page-phone", {"width": 390, "height": 1500}, locale="zh-CN")


class Shots:
    """Takes pictures with one Chromium into one folder."""

    def __init__(self, chromium: Any, folder: Path) -> None:
        self._chromium = chromium
        self._folder = folder

    async def take(
        self,
        name: str,
        size: dict[str, int],
        whole: bool = False,
        act: Callable[[Page], Awaitable[None]] | None = None,
        **context: Any,
    ) -> None:
        """Write ``name``.png.

        Args:
            size: of the window.
            whole: the page down to its end instead of the window.
            act: what to do on the page first.
            context: Playwright's settings of a browser context.
        """
        page = await (await self._chromium.new_context(viewport=size, **{"locale": "en-GB", **context})).new_page()
        await page.goto(URL)
        await page.locator("#link[data-link=live]").wait_for()
        if act is not None:
            await act(page)
        await asyncio.sleep(3)  # The rates of the arrows are known after a few updates.
        path = self._folder / f"{name}.png"
        await page.screenshot(path=path, full_page=whole, animations="disabled")
        await page.close()
        if smaller := shutil.which("pngquant"):
            command = (smaller, "--force", "--skip-if-larger", "--output", str(path), "64", str(path))
            await (await asyncio.create_subprocess_exec(*command)).wait()
        print(path)


async def main(folder: Path) -> None:
    """Take all pictures."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for scene in frozen, recovered:
            async with stage() as on:
                load = asyncio.create_task(on.load(2.5))
                await scene(on, Shots(running, folder))
                load.cancel()
                await asyncio.gather(load, return_exceptions=True)
        await running.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/img"), help="folder (default: %(default)s)")
    asyncio.run(main(parser.parse_args().out))
