"""The page and its feed over real sockets: headers, key, framing, bounds, clients that leave or read nothing, end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from disagg_proxy.cluster.instance import State
from disagg_proxy.page.document import document
from disagg_proxy.page.feed import joined
from tests.conftest import soon
from tests.simulated import REQUESTS, check_error

KEY = pytest.mark.settings(api_key="sesame")
FEED = "/dashboard/events"


@pytest.fixture
def one_viewer(monkeypatch) -> None:
    monkeypatch.setattr("disagg_proxy.page.feed.MAX_VIEWERS", 1)


async def read(answer: aiohttp.ClientResponse) -> tuple[str, Any]:
    """One event of the feed."""
    raw = await soon(answer.content.readuntil(b"\n\n"))
    event, data = raw.decode().rstrip("\n").split("\n")
    return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def test_a_slash_at_the_end_leads_to_the_page_whose_addresses_are_relative(machine) -> None:
    async with machine.http.get(machine.proxy.url + "/dashboard/", allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (308, "../dashboard")


@pytest.mark.parametrize("path", ["/", "/dashboard", "/dashboard/"])
async def test_the_page_is_there_with_its_headers(machine, path: str) -> None:
    async with machine.http.get(machine.proxy.url + path) as answer:
        assert answer.status == 200
        assert await answer.read() == document().body
        for name, value in document().headers.items():
            assert answer.headers[name] == value
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


async def test_a_page_that_the_browser_has_is_not_sent_again(machine) -> None:
    headers = {"If-None-Match": document().headers["ETag"]}
    async with machine.http.get(machine.proxy.url + "/", headers=headers) as answer:
        assert (answer.status, await answer.read()) == (304, b"")


@KEY
async def test_with_a_key_the_page_is_open_and_what_it_shows_is_not(machine) -> None:
    url = machine.proxy.url
    async with machine.http.get(url + "/") as answer:
        page = await answer.read()
        assert answer.status == 200 and page == document().body
    for headers in {}, {"Authorization": "Bearer wrong"}:
        async with machine.http.get(url + FEED, headers=headers) as answer:
            assert answer.status == 401
    async with machine.http.get(f"{url}{FEED}?key=sesame&api_key=sesame") as answer:
        assert answer.status == 401, "a key in an address opens nothing"
    async with machine.http.get(url + FEED, headers={"Authorization": "Bearer sesame"}) as answer:
        assert (await read(answer))[0] == "view"


async def test_the_feed_shows_the_machine_and_goes_on(machine, pair) -> None:
    prefill, decode = pair
    async with machine.http.get(machine.proxy.url + FEED) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-store"
        kind, seen = await read(answer)
        assert kind == "view"
        assert {i["http_address"]: i["state"] for i in seen["instances"]} == {
            prefill.http_address: "ready",
            decode.http_address: "ready",
        }
        assert seen["health"]["pairs"] == 1 and seen["recent"] == []
        await machine.check_right()
        while not seen["recent"]:
            kind, update = await read(answer)
            assert kind == "update"
            seen = joined(seen, update)
        assert seen["recent"][0]["outcome"] == "ok"
        assert seen["flows"] == [
            {"prefill": prefill.http_address, "decode": decode.http_address, "in_flight": 0, "total": 1}
        ]


async def test_the_feed_says_nothing_of_prompts_keys_and_clients(machine, pair) -> None:
    await machine.post("/v1/completions", {**REQUESTS["/v1/completions"], "prompt": "secret words", "user": "somebody"})
    async with machine.http.get(machine.proxy.url + FEED) as answer:
        raw = json.dumps(await read(answer))
    assert "secret" not in raw and "somebody" not in raw and "___prefill_addr" not in raw


async def test_more_viewers_than_may_be_get_503(one_viewer, machine) -> None:
    async with machine.http.get(machine.proxy.url + FEED) as first:
        await read(first)
        async with machine.http.get(machine.proxy.url + FEED) as second:
            check_error(second.status, second.headers, await second.read(), 503, "service_unavailable")
            assert second.headers["Retry-After"] == "10"
    await soon(machine.proxy.until_idle())
    async with machine.http.get(machine.proxy.url + FEED) as third:
        assert (await read(third))[0] == "view", "who has left makes room"


async def test_a_viewer_that_leaves_before_a_word_makes_room(one_viewer, machine, dial) -> None:
    for _ in range(3):
        wire = await dial(machine.proxy.url)
        wire.send(f"GET {FEED} HTTP/1.1\r\nHost: proxy\r\n\r\n")
        wire.leave()
    await soon(machine.proxy.until_idle())
    async with machine.http.get(machine.proxy.url + FEED) as answer:
        assert (await read(answer))[0] == "view"


async def test_the_feed_ends_with_the_proxy_at_once(machine) -> None:
    async with machine.http.get(machine.proxy.url + FEED) as answer:
        await read(answer)
        shutdown = machine.proxy.services.shutdown
        await soon(machine.proxy.stop())
        while (event := await read(answer))[0] != "end":
            pass
        assert event == ("end", {})
        assert await soon(answer.content.read()) == b""
        assert shutdown.remaining > 2, "nothing waited for the grace time"


async def test_a_viewer_that_reads_nothing_holds_up_nobody(machine, dial, monkeypatch) -> None:
    services = machine.proxy.services

    async def huge() -> dict[str, Any]:
        return {**await type(services).page_view(services), "version": "x" * 20_000_000}

    monkeypatch.setattr(services, "page_view", huge)
    wire = await dial(machine.proxy.url)
    wire.writer.transport.pause_reading()
    wire.send(f"GET {FEED} HTTP/1.1\r\nHost: proxy\r\n\r\n")

    async def stuck() -> None:
        while not any(c.flow and c.flow.write_paused for c in machine.proxy.server.server_state.connections):
            await asyncio.sleep(0.01)

    await soon(stuck())
    async with machine.http.get(machine.proxy.url + FEED) as answer:
        assert await soon(answer.content.readexactly(11)) == b"event: view", "others see the page"
    await soon(machine.proxy.stop())
    assert services.shutdown.remaining > 2, "nothing waited for the grace time"


@pytest.mark.settings(freeze_after_min=0.4, freeze_after_max=0.4, probe_interval=0.1)
async def test_a_frozen_decode_is_in_the_feed_with_what_was_done(machine, pair) -> None:
    _, decode = pair
    async with machine.http.get(machine.proxy.url + FEED) as answer:
        _, seen = await read(answer)
        decode.faults.lose_kv()
        await soon(machine.check_right())
        await soon(machine.proxy.until_state(decode.http_address, State.READY))
        while not any(e["kind"] == "freed" for e in seen["events"]):
            kind, data = await read(answer)
            seen = joined(seen, data) if kind == "update" else data
    kinds = [e["kind"] for e in seen["events"] if e["instance"] == decode.http_address]
    assert [kind for kind in kinds if kind in ("frozen", "replayed", "freed")] == ["frozen", "replayed", "freed"]
