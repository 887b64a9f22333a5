"""A headless Chromium for the page: Playwright's client with the system's browser. What is missing is said loudly."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

try:
    from playwright.async_api import Page, async_playwright
except ModuleNotFoundError:
    Page = Any  # type: ignore[misc]
    async_playwright = None  # type: ignore[assignment]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

WHY_NOT = (
    "THE PAGE WAS NOT TRIED IN A BROWSER: pip install playwright"
    if async_playwright is None
    else "THE PAGE WAS NOT TRIED IN A BROWSER: no chromium on PATH; on Debian: apt-get install chromium"
    if CHROMIUM is None
    else ""
)

needs_browser = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


class Browser:
    """Opens the page, and keeps what the browser complains of.

    Attributes:
        complaints: console errors (a broken policy among them), exceptions in scripts, dialogs.
        expected: parts of complaints that a test provokes.
    """

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium
        self.complaints: list[str] = []
        self.expected: list[str] = []

    async def open(self, url: str, width: int = 1280, height: int = 900, **context: Any) -> Page:
        settings = {"viewport": {"width": width, "height": height}, "locale": "en-US", **context}
        page = await (await self._chromium.new_context(**settings)).new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda m: m.type in ("error", "warning") and self.complaints.append(m.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        await page.goto(url)
        return page

    def unexpected(self) -> list[str]:
        return [text for text in self.complaints if not any(part in text for part in self.expected)]


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    # As root, and in containers, Chromium's own sandbox cannot be had.
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        try:
            yield Browser(running)
        finally:
            await running.close()
