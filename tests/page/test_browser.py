"""What a person sees in a real browser, on simulated engines."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from disagg_proxy.cluster.engine_load import EngineLoad
from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.config.keys_file import table_of
from disagg_proxy.page.document import strings
from disagg_proxy.telemetry.request_recorder import Flow
from disagg_proxy.telemetry.timeseries import SECONDS, Step
from disagg_sim import expected_chat_text, expected_text
from tests.conftest import running_proxy, soon
from tests.page.browser import needs_browser
from tests.simulated import REQUESTS

pytestmark = needs_browser

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
SOON = pytest.mark.settings(freeze_after_min=0.4, freeze_after_max=0.4, probe_interval=0.1)
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"


async def says(page, selector: str, text: str | re.Pattern[str]) -> None:
    """Wait until an element says it."""
    await page.locator(selector).filter(has_text=text).first.wait_for()


async def test_a_pair_that_serves(machine, pair, browser) -> None:
    prefill, decode = pair
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Serving: 1 pair ready")
    assert await page.locator("#now").get_attribute("data-level") == "ok"
    for side, engine in (".side.prefill", prefill), (".side.decode", decode):
        card = page.locator(f"{side} .card")
        assert await card.count() == 1
        assert await card.locator(".state-word").text_content() == "Ready"
        assert await card.locator(".address").text_content() == engine.http_address
        assert await card.locator(".icon").get_attribute("data-shape") == "ready"
    await machine.check_right()
    await says(page, "#requests .outcome", "OK")
    await says(page, "#flow-list", f"{prefill.http_address} to {decode.http_address}: 0 in flight, 1 in total")
    await says(page, "#labels", "in flight")
    await says(page, "#events .kind", "Ready")
    assert await page.locator("#requests .bar .seg:visible").count() >= 2


@pytest.mark.parametrize("shows", [True, False])
async def test_the_load_of_an_engine_is_on_its_card(machine, pair, browser, shows: bool) -> None:
    _, decode = pair
    load = EngineLoad(machine.proxy.services.registry.now() + 600, 12, 3, 0.456, 310592, 7)
    machine.proxy.services._load_reader.read = _leave  # This test sets what is shown.
    machine.proxy.instance(decode.http_address).engine_load = load if shows else None
    page = await browser.open(machine.proxy.url)
    card = page.locator(".side.decode .card")
    if not shows:
        await card.locator(".state-word").wait_for()
        assert await card.get_by_text("KV cache").is_hidden() and await card.get_by_text("KV dropped").is_hidden()
        return
    await card.get_by_text("KV cache 46 % full").wait_for()
    assert await card.locator(".kv .meter-name").text_content() == "KV cache 46 % full310,592 tokens"
    assert await card.locator(".figures").get_by_text("12 / 3").is_visible()
    await card.get_by_text("KV dropped: 7 prompts were computed again").wait_for()
    await page.locator("#language").click()
    await card.get_by_text("KV 缓存已用 46 %").wait_for()


async def _leave(instance: Instance) -> None:
    return


@pytest.mark.settings(placement="elastic")
async def test_where_elastic_placement_has_requests_prefilled(machine, pair, browser) -> None:
    prefill, decode = (machine.proxy.instance(engine.http_address) for engine in pair)
    services = machine.proxy.services
    page = await browser.open(machine.proxy.url)
    await says(page, "#placement", "Elastic placement: no requests yet. It is still learning how fast the engines are.")
    services.stats.ways.update({"split": 5, "decode_alone": 2, "prefill_alone": 1})
    for pair_of, total in (((prefill.key, decode.key), 5), ((None, decode.key), 2), ((None, prefill.key), 1)):
        services.recorder.flows[pair_of] = Flow(*pair_of, 0, total)
    placed = "Elastic placement: 63 % split, 25 % decode alone, 13 % prefill alone, of 8 requests."
    await says(page, "#placement", placed)
    await says(page, ".side.decode .notes", "Served alone, without another engine: 2 of 7 requests")
    await says(page, ".side.prefill .notes", "Served alone, without another engine: 1 of 1 requests")
    await says(page, "#flow-list", f"prefill alone to {prefill.http.text}: 0 in flight, 1 in total")
    assert await page.locator("#wires .flow").count() == 2, "no arrow ends at a prefill"
    await page.locator("#language").click()
    await says(page, "#placement", "弹性放置：分离 63 %、仅 decode 25 %、仅 prefill 13 %，共 8 个请求。")


async def test_nobody_has_registered(machine, browser) -> None:
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Not serving: no prefill has registered")
    await says(page, "#none-decode", "No decode has registered yet.")
    await machine.engine("prefill")
    await says(page, "#now-text", "Not serving: no decode has registered")


@SOON
async def test_a_decode_that_is_frozen_for_good_is_named_with_what_was_done(machine, pair, browser) -> None:
    _, decode = pair
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Serving: 1 pair")
    decode.faults.hold("schedule")
    asked = asyncio.gather(*(machine.send(PATH, ASK) for _ in range(2)))
    await says(page, "#now-text", f"Decode {decode.http_address} is frozen")
    await says(page, "#now-age", re.compile(r"for \d+ s"))
    await says(page, "#now-details", f"Decode {decode.http_address}: stalled: no output")
    await says(
        page,
        "#now-details",
        re.compile(r"Action taken: out of rotation, and (one prefill was|\d+ prefills were) replayed"),
    )
    await says(page, "#now-details", "Only a restart can help")
    await says(page, "#now-details", "There is no other pair: new requests get 503 until it recovers.")
    card = page.locator(".side.decode .card")
    assert await card.locator(".state-word").text_content() == "Frozen"
    assert await card.locator(".icon").get_attribute("data-shape") == "frozen"
    assert await card.locator(".badge").text_content() == "Needs a restart"
    assert (await page.title()).startswith(f"Decode {decode.http_address} is frozen")
    assert [status for status, _, _ in await soon(asked)] == [504, 504]
    await machine.send(PATH, ASK)
    await says(page, "#requests .outcome", "No pair")
    decode.faults.release()


@SOON
async def test_a_decode_that_was_freed_leaves_its_story(machine, pair, browser) -> None:
    _, decode = pair
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Serving: 1 pair")
    decode.faults.lose_kv()
    await soon(machine.check_right())
    await soon(machine.proxy.until_state(decode.http_address, State.READY))
    await says(page, "#incident-end", "resolved after")
    await says(page, "#now-text", "Serving: 1 pair")
    assert await page.locator("#incident-title").text_content() == f"Last incident: Decode {decode.http_address}"
    steps = await page.locator("#incident-steps .kind").all_text_contents()
    assert steps == ["Frozen", "Replayed", "Recovered", "Ready"]
    await says(page, ".side.decode .notes", "Froze once; prefills replayed: 1")


@pytest.mark.parametrize("route", ["completions", "chat"])
async def test_a_test_prompt_streams_and_shows_its_route(machine, pair, browser, route: str) -> None:
    prefill, decode = pair
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Serving")
    await page.get_by_label("Prompt").fill("Tell me more")
    await page.get_by_label("Route").select_option(label=route.title())
    await page.get_by_label("Max tokens").fill("9")
    await page.get_by_role("button", name="Send").click()
    await says(page, "#ask-route", f"Served by prefill {prefill.http_address} and decode {decode.http_address}")
    right = expected_text("Tell me more", 9)
    if route == "chat":
        right = expected_chat_text([{"role": "user", "content": "Tell me more"}], 9)
    assert await page.locator("#ask-answer").text_content() == right
    await says(page, "#ask-status", re.compile(r"First token after [\d.]+ m?s, complete after [\d.]+ m?s, \d+ chunks"))


async def test_a_test_prompt_can_be_stopped_and_may_fail(machine, browser) -> None:
    browser.expected.append("503")
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Not serving")
    await page.get_by_role("button", name="Send").click()
    await says(page, "#ask-status", "503: No prefill/decode pair can serve this")
    _, decode = await machine.pair()
    with decode.faults.held("schedule"):
        await page.get_by_role("button", name="Send").click()
        await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
        await page.get_by_role("button", name="Stop").click()
        await says(page, "#ask-status", "Stopped")


async def test_names_are_text_and_nothing_else(machine, browser) -> None:
    await machine.pair(models=(EVIL,))
    page = await browser.open(machine.proxy.url)
    await says(page, ".card .models", EVIL)
    await says(page, "#events .why", EVIL)
    await page.get_by_label("Model").select_option(label=EVIL)
    await page.get_by_label("Prompt").fill(EVIL)
    await page.get_by_role("button", name="Send").click()
    await says(page, "#ask-route", "Served by prefill")
    assert await page.locator("img, main script").count() == 0


@pytest.mark.parametrize("language", ["zh-CN", "zh-TW"])
async def test_chinese_by_the_browsers_language_and_back(machine, pair, browser, language: str) -> None:
    page = await browser.open(machine.proxy.url, locale=language)
    await says(page, "#now-text", "服务正常：1 对实例就绪")
    assert await page.locator("html").get_attribute("lang") == "zh-CN"
    assert await page.locator(".card .state-word").all_text_contents() == ["就绪", "就绪"]
    await page.locator("#language").click()
    await says(page, "#now-text", "Serving: 1 pair ready")
    assert await page.locator("html").get_attribute("lang") == "en"
    await page.reload()
    await says(page, "#now-text", "Serving: 1 pair ready")


async def test_dark_by_the_systems_wish_and_by_the_button(machine, browser) -> None:
    page = await browser.open(machine.proxy.url, color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = await page.evaluate(background)
    await page.get_by_role("button", name="Switch between the light and the dark theme").click()
    light = await page.evaluate(background)
    assert dark == "rgb(13, 17, 23)" and light == "rgb(243, 245, 248)"
    await page.reload()
    assert await page.evaluate(background) == light


@pytest.mark.settings(api_key="sesame")
async def test_the_key_is_asked_for_kept_in_the_tab_and_never_in_the_address(machine, browser) -> None:
    browser.expected.append("401")
    page = await browser.open(machine.proxy.url)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await says(page, "#key-form", "This proxy requires an API key")
    assert not await page.locator("#content").is_visible()
    await page.get_by_label("API key", exact=True).fill("wrong")
    await page.get_by_role("button", name="Sign in").click()
    await says(page, "#key-wrong", "The proxy rejected this key.")
    await page.get_by_label("API key", exact=True).fill("sesame")
    await page.keyboard.press("Enter")
    await says(page, "#now-text", "Not serving: no prefill has registered")
    await page.reload()
    await says(page, "#now-text", "Not serving: no prefill has registered")
    assert not any("sesame" in url for url in [page.url, *asked]) and asked
    assert "sesame" not in await page.evaluate("JSON.stringify(localStorage) + document.cookie")
    await page.get_by_role("button", name="Forget the key").click()
    await says(page, "#key-form", "This proxy requires an API key")
    assert "sesame" not in await page.evaluate("JSON.stringify(sessionStorage)")


async def test_a_key_without_monitoring_is_rejected_like_a_wrong_one(browser, tmp_path) -> None:
    browser.expected += ["401", "403"]
    file = tmp_path / "keys.toml"
    file.write_text(table_of("client", "sk-client") + table_of("operator", "sk-operator") + "monitoring = true\n")
    async with running_proxy(api_keys_file=str(file)) as proxy:
        page = await browser.open(proxy.url)
        await says(page, "#key-form", "This proxy requires an API key")
        await page.get_by_label("API key", exact=True).fill("sk-client")
        await page.keyboard.press("Enter")
        await says(page, "#key-wrong", "The proxy rejected this key.")
        await page.get_by_label("API key", exact=True).fill("sk-operator")
        await page.keyboard.press("Enter")
        await says(page, "#now-text", "Not serving: no prefill has registered")
        await page.close()


async def test_the_page_outlives_the_proxy(browser) -> None:
    browser.expected.append("ERR_")
    async with running_proxy() as proxy:
        page = await browser.open(proxy.url)
        await says(page, "#link", "Live")
        port = int(proxy.url.rpartition(":")[2])
    await says(page, "#now-text", "The proxy does not respond")
    async with running_proxy(http_port=port):
        await says(page, "#link", "Live")
        await says(page, "#now-text", "Not serving")


async def test_older_values_of_a_chart_are_read_by_keys(machine, pair, browser) -> None:
    series = machine.proxy.services.recorder.timeseries
    series.past.extend(Step(series.now.start - before * SECONDS) for before in (4, 3, 2, 1))
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Serving")
    chart = page.locator(".chart.load")
    assert "left and right arrow keys" in (await chart.locator(".plot").get_attribute("aria-label") or "")
    await chart.locator(".plot").focus()
    await page.keyboard.press("ArrowLeft")
    await says(page, ".chart.load .readout", re.compile(r"^\d\d:\d\d:\d\d · in flight 0 · queued 0$"))
    first = await chart.locator(".readout").text_content()
    await page.keyboard.press("ArrowLeft")
    assert await chart.locator(".readout").text_content() != first


async def test_suspect_busy_and_ejected_engines_are_shown_with_their_cause(machine, pair, browser) -> None:
    registry = machine.proxy.services.registry
    engines = [await machine.engine("decode") for _ in range(3)]
    for engine in engines:
        await soon(machine.proxy.until_state(engine.http_address, State.READY))
    suspect, busy, ejected = (machine.proxy.instance(engine.http_address) for engine in engines)
    busy.breaker.record_busy(registry.now() + 3600.0)
    busy.rejections_total = 3
    ejected.breaker.trip(registry.now() + 3600.0)
    # Each check of the detector ends a suspicion without a cause.
    await machine.proxy.services._stall_detector.stop()
    registry.suspect(suspect, True)
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Serving: 2 pairs ready, but some instances are not")
    for engine, state, shape in (
        (suspect, "Suspect", "suspect"),
        (busy, "Busy", "busy"),
        (ejected, "Ejected", "ejected"),
    ):
        why = strings()["en"][f"why_{shape}"]
        card = page.locator(f'.card[data-key="{engine.key}"]')
        assert await card.locator(".state-word").text_content() == state
        assert await card.locator(".icon").get_attribute("data-shape") == shape
        assert await card.locator(".notes li").first.text_content() == why and await card.locator(".notes").is_visible()
        await says(page, "#now-details", f"Decode {engine.http.text}: {state}. {why}")
    await says(page, f'.card[data-key="{busy.key}"] .notes', "Rejected 3 requests as busy")
    await page.locator("#language").click()
    for state in "疑似卡住", "繁忙", "已移出":
        await says(page, ".card .state-word", state)


async def test_a_saturated_proxy_says_so(machine, pair, browser) -> None:
    instance = machine.proxy.instance(pair[1].http_address)
    instance.breaker.record_busy(machine.proxy.services.registry.now() + 3600.0)
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Saturated: every decode is busy, requests may get 503")
    assert await page.locator("#now").get_attribute("data-level") == "warn"


@pytest.mark.settings(freeze_after_min=0.1, freeze_after_max=300.0)
async def test_requests_that_wait_without_an_answer_are_said_first(machine, pair, browser) -> None:
    await machine.check_right()
    machine.proxy.services._stall_detector.serving._longest = 0.3
    page = await browser.open(machine.proxy.url)
    with pair[0].faults.held("forward"):
        waiting = [asyncio.create_task(machine.post(PATH, ASK)) for _ in range(3)]
        await says(page, "#now-text", "Not serving: requests wait and nothing is answered")
        await says(page, "#now-details", "3 requests are in flight or queued, and no decode has made progress for")
        assert await page.locator("#now").get_attribute("data-level") == "bad"
    await soon(asyncio.gather(*waiting))
    await says(page, "#now-text", "Serving: 1 pair")


@pytest.mark.settings(probe_interval=60.0)
async def test_simulated_engines_are_called_simulated(machine, pair, browser) -> None:
    page = await browser.open(machine.proxy.url)
    await says(page, "#simulated", "SIMULATED ENGINES: no model runs.")
    assert await page.locator(".card .state .simulated").all_text_contents() == ["SIMULATED"] * 2
    for instance in machine.proxy.services.registry.instances():
        instance.models = {name: {**card, "owned_by": "vllm"} for name, card in instance.models.items()}
        break
    await says(page, "#simulated", "1 of 2 engines are SIMULATED")
    for instance in machine.proxy.services.registry.instances():
        if instance.models[next(iter(instance.models))]["owned_by"] == "vllm":
            instance.models = {}
    await says(page, "#simulated", "SIMULATED ENGINES")  # One whose models are not known yet may be either.


async def test_the_form_comes_first_until_there_is_something_else_to_show(machine, pair, browser) -> None:
    place = "document.getElementById('ask-panel').parentElement.id || 'aside'"
    page = await browser.open(machine.proxy.url)
    await says(page, "#now-text", "Serving")
    assert await page.evaluate(place) == "content"
    await page.get_by_role("button", name="Send").click()
    await says(page, "#ask-route", "Served by prefill")
    assert await page.evaluate(place) == "content", "it does not move while somebody reads the response"
    await page.reload()
    await says(page, "#requests .outcome", "OK")
    assert await page.evaluate(place) == "aside"


async def test_client_errors_are_apart_from_failures_and_causes_are_readable(machine, pair, browser) -> None:
    await machine.send(PATH, ASK)
    await machine.send(PATH, {**ASK, "model": "nobody"})
    page = await browser.open(machine.proxy.url)
    await says(page, "#tiles", "2 finished: 0 failed, 1 client errors")
    cause = page.locator('.request[data-outcome="client_error"] .cause')
    assert await cause.text_content() == "404 · model_not_found · nobody" and await cause.is_visible()
    await page.get_by_role("button", name="Failed", exact=True).click()
    await says(page, "#requests-none", "No recent request has failed.")
    await page.get_by_role("button", name="Client errors").click()
    assert await page.locator("#requests .outcome").all_text_contents() == ["Rejected"]
    assert re.fullmatch(r"[\d.]+ m?s", await page.locator("#requests-scale").text_content() or "")


async def test_bars_have_a_name_a_scale_and_their_values_as_text(machine, pair, browser) -> None:
    await machine.stream(PATH, ASK)
    page = await browser.open(machine.proxy.url)
    value = r"[\d.]+ m?s"
    await says(page, "#requests .cause", re.compile(rf"^prefill {value}, transfer {value}, decode {value}$"))
    assert await page.locator("#requests .cause").first.is_visible()
    assert await page.locator("[title]").count() == 0, "nothing is said by a tooltip alone"
    await says(page, ".side.decode .meter-name", "0 requests in flight")
    await says(page, ".side.decode .meter-name", "full bar: 8")
    assert await page.locator(".chart.requests .series li").all_text_contents() == ["OK", "failed", "client errors"]
    await says(page, ".chart.requests .axis", re.compile(r"^[\d.]+/s$"))
    await says(page, ".chart.load .axis", "1 request")
    await says(page, ".chart.load .axis", re.compile("^0$"))


async def test_gaps_in_the_data_are_gaps_in_the_charts(machine, pair, browser) -> None:
    view = {"health": {}, **await machine.proxy.services.page_view()}
    view["verdict"] = {"level": "ok", "sign": "ready", "head": {"key": "head_alone", "values": {}}, "details": []}
    view["verdict"]["since"] = view["incident"] = None
    steps = view["rates"]["steps"]
    unknown = {**steps[0], "requests": None}
    assert unknown == steps[0], "before the start nothing is known"
    known = {**unknown, "requests": {"ok": 5}, "in_flight": 1, "queued": 0, "ttft": {"p50": 5, "p99": 9, "p90": 9}}
    for place in (-12, -11, -10, -5, -4):
        steps[place] = {**known, "time": steps[place]["time"]}
    for place in (-9, -8, -7, -6, -3, -2):
        steps[place] = {**unknown, "time": steps[place]["time"]}
    page = await browser.open("about:blank")
    body = f"event: view\ndata: {json.dumps(view)}\n\n"
    await page.route("**/dashboard/events", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    await page.goto(machine.proxy.url)
    for chart in ("ttft", "requests", "load"):
        area = page.locator(f".chart.{chart} .area")
        await page.wait_for_function(f"document.querySelector('.chart.{chart} .area')?.getAttribute('d')")
        runs = (await area.get_attribute("d") or "").split("Z")[:-1]
        assert [run.count("L") for run in runs] == [4, 3], "one area for each run of values"
        assert (await page.locator(f".chart.{chart} .plot .line.one").get_attribute("d") or "").count("M") == 2
