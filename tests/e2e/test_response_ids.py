"""Every answer carries a request id, which is also in the access log and in the log lines about the request."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from contextlib import AsyncExitStack
from typing import Any

import anthropic
import openai
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.conftest import running_proxy, soon
from tests.simulated import CHAT, PROMPT, REQUESTS, Machine

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
OWN = re.compile("[0-9a-f]{32}")
RAW = json.dumps(ASK)


def message(start: str, *headers: str, body: str = "") -> str:
    return "\r\n".join([start, *headers]) + "\r\n\r\n" + body


HOST, LENGTH = "Host: proxy\r\nContent-Type: application/json", f"Content-Length: {len(RAW)}"
MINE = "X-Request-Id: mine-1"
MESSAGES: dict[str, tuple[str, int]] = {
    # Routes of Quart.
    "health": (message("GET /health HTTP/1.1", HOST, MINE), 200),
    "livez": (message("GET /livez HTTP/1.1", HOST, MINE), 200),
    "head of health": (message("HEAD /livez HTTP/1.1", HOST, MINE), 200),
    "stats": (message("GET /stats HTTP/1.1", HOST, MINE), 200),
    "metrics": (message("GET /metrics HTTP/1.1", HOST, MINE), 200),
    "page": (message("GET / HTTP/1.1", HOST, MINE), 200),
    "models": (message("GET /v1/models HTTP/1.1", HOST, MINE), 200),
    "version": (message("GET /version HTTP/1.1", HOST, MINE), 200),
    "options": (message(f"OPTIONS {PATH} HTTP/1.1", HOST, MINE), 200),
    # Both ways of a generation request.
    "fast path": (message(f"POST {PATH} HTTP/1.1", HOST, MINE, LENGTH, body=RAW), 200),
    "HTTP/1.0": (message(f"POST {PATH} HTTP/1.0", HOST, MINE, LENGTH, body=RAW), 200),
    "chunked": (
        message(
            f"POST {PATH} HTTP/1.1",
            HOST,
            MINE,
            "Transfer-Encoding: chunked",
            body=f"{len(RAW):x}\r\n{RAW}\r\n0\r\n\r\n",
        ),
        200,
    ),
    "no JSON": (message(f"POST {PATH} HTTP/1.1", HOST, MINE, "Content-Length: 1", body="x"), 400),
    # Refused behind the head.
    "empty": (message(f"POST {PATH} HTTP/1.1", HOST, MINE, "Content-Length: 0"), 400),
    "too large": (message(f"POST {PATH} HTTP/1.1", HOST, MINE, "Content-Length: 10001"), 413),
    "compressed": (message(f"POST {PATH} HTTP/1.1", HOST, MINE, "Content-Encoding: gzip", LENGTH, body=RAW), 415),
    "no path": (message("GET /nowhere HTTP/1.1", HOST, MINE), 404),
    "no method": (message(f"GET {PATH} HTTP/1.1", HOST, MINE), 405),
    "not served": (message("POST /v1/audio/speech HTTP/1.1", HOST, MINE, "Content-Length: 0"), 501),
    "slow body": (message(f"POST {PATH} HTTP/1.1", HOST, MINE, "Content-Length: 9", body="{"), 408),
    "slow body through Quart": (
        message(f"POST {PATH} HTTP/1.1", HOST, MINE, "Transfer-Encoding: chunked", body="1\r\n{"),
        408,
    ),
    "bad chunks": (message(f"POST {PATH} HTTP/1.1", HOST, MINE, "Transfer-Encoding: chunked", body="zz\r\n"), 400),
    # Refused heads, of which the id was read.
    "no host": (message(f"POST {PATH} HTTP/1.1", MINE, LENGTH, body=RAW), 400),
    "two hosts": (message(f"POST {PATH} HTTP/1.1", MINE, HOST, HOST, LENGTH, body=RAW), 400),
    "absolute form": (message("GET http://a/health HTTP/1.1", HOST, MINE), 400),
    "two lengths": (message(f"POST {PATH} HTTP/1.1", HOST, MINE, LENGTH, "Content-Length: 3"), 400),
    "HTTP/2.0": (message("GET /health HTTP/2.0", HOST, MINE), 505),
    "large head": (message("GET /health HTTP/1.1", HOST, MINE, "X-A: " + "a" * 70_000), 431),
    "slow head": (f"GET /health HTTP/1.1\r\n{HOST}\r\n{MINE}\r\nX-A: ", 408),
}
WITHOUT_ONE = {"nonsense": ("nonsense\r\n\r\n", 400), "an early error": ("GET /health\x00\r\n", 400)}


@pytest.mark.settings(max_body_bytes=10_000, body_timeout=0.2, header_timeout=0.2)
@pytest.mark.parametrize("own", [True, False], ids=["the client's", "a new one"])
@pytest.mark.parametrize("name", MESSAGES)
async def test_every_answer_has_one(machine, pair, dial, name: str, own: bool) -> None:
    text, expected = MESSAGES[name]
    wire = await dial(machine.proxy.url)
    wire.send(text if own else text.replace(MINE + "\r\n", ""))
    status, headers = await wire.head()
    assert status == expected
    [found] = headers.getall("X-Request-Id")
    assert found == "mine-1" if own else OWN.fullmatch(found)
    assert "Request-Id" not in headers


@pytest.mark.parametrize("name", WITHOUT_ONE)
async def test_what_is_no_request_gets_a_new_one(machine, dial, name: str) -> None:
    text, expected = WITHOUT_ONE[name]
    wire = await dial(machine.proxy.url)
    wire.send(text)
    status, headers = await wire.head()
    assert status == expected and OWN.fullmatch(headers["X-Request-Id"])


@pytest.mark.settings(api_key="right")
async def test_a_refused_key_has_one(machine, dial) -> None:
    wire = await dial(machine.proxy.url)
    for path in (PATH, "/stats"):
        wire.post(path, ASK, MINE)
        status, headers, _ = await wire.answer()
        assert (status, headers.getall("X-Request-Id")) == (401, ["mine-1"])


async def test_answers_during_a_shutdown_have_one(machine, pair, dial) -> None:
    decode = pair[1]
    decode.faults.hold("schedule")
    running, late, incomplete = [await dial(machine.proxy.url) for _ in range(3)]
    running.post(PATH, ASK)
    await soon(decode.wait_until(lambda state: state["held_at"]))
    incomplete.start(PATH, "Content-Length: 100", MINE)
    while machine.proxy.exchanges < 2:
        await asyncio.sleep(0)
    ending = asyncio.create_task(machine.proxy.stop())
    machine.proxy.server.on_signal()
    late.post(PATH, ASK, MINE)
    for wire in (late, incomplete):
        status, headers, _ = await wire.answer()
        assert (status, headers.getall("X-Request-Id")) == (503, ["mine-1"])
    decode.faults.release()
    assert OWN.fullmatch((await running.answer())[1]["X-Request-Id"])
    await soon(ending)


@pytest.mark.parametrize("query", ["", "?beta=true"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_anthropics_name_of_it(machine, pair, dial, query: str, stream: bool) -> None:
    wire = await dial(machine.proxy.url)
    for chunked in (False, True):
        wire.chunked = chunked
        for path, body, expected in (
            ("/v1/messages", {**REQUESTS["/v1/messages"], "stream": stream}, 200),
            ("/v1/messages", {"model": "other"}, 404),
            ("/v1/messages/count_tokens", {"model": "sim-model", "messages": CHAT}, 200),
        ):
            for own in ([], [MINE]):
                wire.post(path + query, body, *own)
                status, headers, _ = await wire.answer()
                assert status == expected
                assert headers.getall("Request-Id") == headers.getall("X-Request-Id")
                assert headers["Request-Id"] == "mine-1" if own else OWN.fullmatch(headers["Request-Id"])
    wire.send(message(f"POST /v1/messages{query} HTTP/1.1", "Content-Length: 0"))
    status, headers, _ = await wire.answer()
    assert status == 400 and OWN.fullmatch(headers["Request-Id"])


async def test_the_official_clients_read_it(machine, pair) -> None:
    url = machine.proxy.url
    async with AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        answer = await client.completions.create(model="sim-model", prompt=PROMPT, max_tokens=2)
        assert answer.id.startswith(f"cmpl-{answer._request_id}") and OWN.fullmatch(answer._request_id)
        for call in (
            client.completions.create(model="other", prompt=PROMPT),
            client.embeddings.create(model="sim-model", input=PROMPT),
            client.models.retrieve("other"),
        ):
            with pytest.raises(openai.APIStatusError) as failed:
                await call
            assert OWN.fullmatch(failed.value.request_id or "")
    async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as claude:
        ask: Any = {"model": "sim-model", "max_tokens": 2, "messages": CHAT}
        assert OWN.fullmatch((await claude.messages.create(**ask))._request_id or "")
        async with claude.messages.stream(**ask) as stream:
            assert OWN.fullmatch(stream.request_id or "")
        with pytest.raises(anthropic.NotFoundError) as missing:
            await claude.messages.create(**{**ask, "model": "other"})
        assert OWN.fullmatch(missing.value.request_id or "")


@pytest.mark.parametrize("own", [{}, {"X-Request-Id": "mine-1"}], ids=["a new one", "the client's"])
@pytest.mark.parametrize("chunked", [False, True], ids=["direct", "quart"])
async def test_it_is_in_the_access_log_and_in_every_line_about_the_request(
    tmp_path, http, dial, caplog, own: dict[str, str], chunked: bool
) -> None:
    """Also when there was no attempt, or several, each of which has an id of its own on the engines."""
    caplog.set_level(logging.INFO, "disagg_proxy")
    file = tmp_path / "access.log"
    found = []
    settings = {"prefill_policy": "round_robin", "decode_policy": "round_robin", "probe_interval": 60.0}
    async with running_proxy(access_log=str(file), **settings) as proxy, AsyncExitStack() as stack:
        machine = Machine(proxy, stack, http)
        wire = await dial(proxy.url)
        wire.chunked = chunked

        async def send(body: dict[str, Any]) -> int:
            wire.post(PATH, body, *(f"{name}: {value}" for name, value in own.items()))
            status, headers, raw = await wire.answer()
            found.append(headers["X-Request-Id"])
            if status == 200 and not own:
                assert json.loads(raw)["id"].startswith("cmpl-" + headers["X-Request-Id"])
            return status

        assert await send(ASK) == 503
        four = [*await machine.pair(), *await machine.pair()]
        prefills, decodes = four[::2], four[1::2]
        assert await send({**ASK, "use_beam_search": True}) == 400
        prefills[0].faults.fail_next(502, b"broken", path=PATH)
        assert await send(ASK) == 200
        for prefill in prefills:
            prefill.faults.fail_next(502, b"broken", path=PATH)
        assert await send(ASK) == 502
        sent = [request.headers["X-Request-Id"] for one in prefills for request in one.received(PATH)]
        assert len(set(sent)) == len(sent) == 4
        if not own:
            attempts = [sum(one[:24] in id for id in sent) for one in found]
            assert attempts == [0, 0, 2, 2], "all are found in the engines' logs"
        await machine.unharmed(*prefills, *decodes)
        await proxy.until_idle()
    assert [json.loads(line)["request_id"] for line in file.read_bytes().splitlines()] == found
    about = [(r.request_id, r.getMessage()) for r in caplog.records if hasattr(r, "request_id")]
    said = [(found.index(one) if not own else None, text) for one, text in about]
    assert all(one == "mine-1" for one, _ in about) or not own
    assert sum("503 no_pair" in text for _, text in said) == sum("502 engine_failed" in text for _, text in said) == 1
    assert sum("leg was answered with status 502" in text for _, text in said) == 3
    assert sum("another attempt" in text for _, text in said) == 2
    if not own:
        assert [one for one, text in said if "502 engine_failed" in text] == [3]
        assert [one for one, text in said if "another attempt" in text] == [2, 3]


@pytest.mark.interpreted
@pytest.mark.parametrize("chunked", [False, True], ids=["direct", "quart"])
async def test_a_bug_is_logged_with_it_once(machine, pair, dial, monkeypatch, caplog, chunked: bool) -> None:
    def broken(*args) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(machine.proxy.services.selection, "choose", broken)
    wire = await dial(machine.proxy.url)
    wire.chunked = chunked
    wire.post(PATH, ASK)
    status, headers, _ = await wire.answer()
    assert status == 500
    traces = [record for record in caplog.records if record.exc_info]
    assert [record.request_id for record in traces] == [headers["X-Request-Id"]]
