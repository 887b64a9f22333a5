"""The page for everybody: names, contrast, order of the keyboard, small screens, less movement."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import soon
from tests.page.browser import needs_browser
from tests.page.test_browser import says
from tests.simulated import REQUESTS

pytestmark = [
    needs_browser,
    pytest.mark.settings(freeze_after_min=0.4, freeze_after_max=0.4, probe_interval=0.1),
]

CHECKS = Path(__file__).with_name("checks.js").read_text(encoding="utf-8")
PATH = "/v1/completions"
LONG = "an-organisation-with-a-very-long-name/a-model-with-a-name-that-is-longer-than-any-phone-is-wide-instruct-awq"


def faults(found: dict[str, Any]) -> dict[str, Any]:
    levels = found["headings"]
    jumps = [pair for pair in itertools.pairwise(levels) if pair[1] > pair[0] + 1]
    wrong = {name: found[name] for name in ("unnamed", "faint", "ids", "small", "landmarks") if found[name]}
    return {**wrong, **({"headings": jumps} if jumps or levels[:1] != [1] else {})}


async def with_everything(machine, page) -> None:
    """Show what there can be: answers, refusals, a frozen decode with its story, a drained instance, an answer."""
    _prefill, decode = await machine.pair(models=(LONG,))
    spare = await machine.engine("prefill", models=(LONG,))
    await says(page, ".side.prefill .card:nth-child(2) .state-word", "Ready")
    machine.proxy.services.registry.drain(machine.proxy.instance(spare.http_address), True)
    ask = {**REQUESTS[PATH], "model": LONG}
    await machine.send(PATH, ask)
    await machine.send(PATH, {**ask, "model": "nobody"})
    await page.get_by_role("button", name="Send").click()
    await says(page, "#ask-route", "Served")
    decode.faults.hold("schedule")
    await soon(asyncio.gather(*(machine.send(PATH, ask) for _ in range(2))))
    await machine.send(PATH, ask)
    await says(page, "#now-details", "Only a restart can help")
    await says(page, "#requests .outcome", "No pair")
    await says(page, ".card .state-word", "Drained")
    decode.faults.release()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_names_contrast_headings_and_sizes(machine, browser, scheme: str) -> None:
    page = await browser.open(machine.proxy.url, color_scheme=scheme, reduced_motion="reduce")
    await says(page, "#now-text", "Not serving")
    found = await page.evaluate(CHECKS)
    assert found["texts"] > 40 and faults(found) == {}
    await with_everything(machine, page)
    browser.expected += ["503", "504"]
    found = await page.evaluate(CHECKS)
    assert found["texts"] > 100 and faults(found) == {}


@pytest.mark.parametrize("language", ["en", "zh-CN"])
async def test_nothing_is_wider_than_a_phone(machine, browser, language: str) -> None:
    page = await browser.open(machine.proxy.url, width=360, height=740, locale="en-US")
    await with_everything(machine, page)
    if language != "en":
        await page.locator("#language").click()
    found = await page.evaluate(CHECKS)
    assert found["wide"] == 0 and faults(found) == {}
    assert await page.locator("#flow-list li").first.is_visible(), "the arrows are words here"
    assert not await page.locator("#lane").is_visible()


async def test_the_checks_can_fail(machine, browser) -> None:
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Not serving")
    await page.evaluate(
        """() => {
        const main = document.querySelector("main");
        main.append(document.createElement("button"));
        main.lastChild.style.width = "3000px";
        const faint = document.createElement("p");
        faint.textContent = "faint";
        faint.style.color = "#bbb";
        main.append(faint);
        }"""
    )
    found = await page.evaluate(CHECKS)
    assert set(faults(found)) == {"unnamed", "faint"} and found["wide"] > 0


async def test_the_keyboard_reaches_everything_in_order_and_shows_where_it_is(machine, pair, browser) -> None:
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Serving")
    stops = []
    for _ in range(40):
        await page.keyboard.press("Tab")
        stop = await page.evaluate(
            """() => {
            const node = document.activeElement;
            if (node === document.body) return null;
            const { outlineStyle, outlineWidth } = getComputedStyle(node);
            const seen = outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
            return [node.id || node.closest(".chart, .skip").className, seen];
            }"""
        )
        if stop is None:
            break
        stops.append(stop)
    assert all(seen for _, seen in stops), stops
    assert [name for name, _ in stops] == [
        "skip",
        "language", "theme",
        "ask-prompt", "ask-model", "ask-api", "ask-tokens", "ask-send", "ask-answer",
        "chart ttft", "chart gap", "chart requests", "chart load",
        "requests-all", "requests-failed", "requests-client", "events",
    ]  # fmt: skip


async def test_the_first_stop_leads_past_the_head(machine, pair, browser) -> None:
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Serving")
    await page.keyboard.press("Tab")
    assert await page.locator(".skip").bounding_box() is not None
    await page.keyboard.press("Enter")
    assert await page.evaluate("document.activeElement.id") == "machine"


async def test_nothing_moves_for_who_does_not_want_it(machine, pair, browser) -> None:
    page = await browser.open(machine.proxy.url, reduced_motion="reduce")
    await says(page, "#link", "Live")
    assert await page.evaluate("document.getAnimations().length") == 0


async def test_what_changes_every_second_is_not_read_aloud(machine, pair, browser) -> None:
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Serving")
    loud = await page.evaluate(
        """() => [...document.querySelectorAll("[aria-live], [role=status], [role=log], [role=alert]")]
            .map((node) => node.id)"""
    )
    assert sorted(loud) == ["ask-route", "ask-status", "events", "key-wrong", "link", "now-details", "now-text"]
