"""The proxy behind nginx and Caddy, with the configurations of docs/deployment.md."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import openai
import pytest

from tests import web_servers
from tests.conftest import Wire, running_proxy, soon
from tests.e2e.test_keys import bearer, table
from tests.ports import hold_port
from tests.simulated import REQUESTS, RIGHT, Machine, check_error, events, text_of, text_of_events

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deployment.md"
PATH = "/v1/completions"
ASK = REQUESTS[PATH]
LONG = {**ASK, "max_tokens": 5000, "ignore_eos": True}

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


def documented(language: str, replaced: dict[str, str]) -> str:
    """The configuration of the page, with what belongs to a test in place of what belongs to a site."""
    [text] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    for old, new in replaced.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@dataclass(frozen=True)
class Front:
    """A web server in front of a proxy.

    Attributes:
        machine: the proxy, whose URL is that of the web server, and its engines.
        direct: the URL of the proxy itself.
        log: the web server's access log.
        reports_cuts: False: the server ends a stream that was cut like one that is complete (Caddy before 2.8).
    """

    machine: Machine
    direct: str
    log: Path
    reports_cuts: bool


@pytest.fixture(
    params=[pytest.param("nginx", marks=web_servers.needs_nginx), pytest.param("caddy", marks=web_servers.needs_caddy)]
)
async def front(request: pytest.FixtureRequest, http: aiohttp.ClientSession, tmp_path: Path) -> AsyncIterator[Front]:
    mark = request.node.get_closest_marker("settings")
    settings = {"access_log": str(tmp_path / "access.log"), **(mark.kwargs if mark else {})}
    keys = tmp_path / "keys.toml"
    if settings.pop("keys", False):
        keys.write_text(table("alice", "requests_per_minute = 1", "tokens_per_minute = 1000"))
        settings["api_keys_file"] = str(keys)
    folder, log = tmp_path / "front", tmp_path / "front" / "log"
    folder.mkdir()
    async with AsyncExitStack() as stack:
        port = hold_port(stack.enter_context(ExitStack()))
        proxy = await stack.enter_async_context(running_proxy(**settings))
        target = proxy.url.removeprefix("http://")
        if request.param == "nginx":
            replaced = {
                "server 127.0.0.1:10001;": f"server {target};",
                "listen 443 ssl;": f"listen 127.0.0.1:{port};",
                "/var/log/nginx/disagg-proxy.log": str(log),
            }
            text = re.sub(r"^ *ssl_certificate.*\n", "", documented("nginx", replaced), flags=re.M)
            served = web_servers.nginx(folder, port, text)
        else:
            replaced = {
                "reverse_proxy 127.0.0.1:10001": f"reverse_proxy {target}",
                "llm.example.com": f"http://:{port}",
                "/var/log/caddy/disagg-proxy.log": str(log),
            }
            served = web_servers.caddy(folder, port, documented("caddyfile", replaced))
        direct, proxy.url = proxy.url, await stack.enter_async_context(served)
        cuts = request.param == "nginx" or web_servers.caddy_version() >= (2, 8)
        yield Front(Machine(proxy, stack, http), direct, log, cuts)


@pytest.fixture
async def wire(front: Front, dial) -> Wire:
    return await dial(front.machine.proxy.url)


async def test_whole_answers(front: Front) -> None:
    await front.machine.pair()
    for path in REQUESTS:
        await front.machine.check_right(path)


@pytest.mark.parametrize("path", REQUESTS)
async def test_a_stream_arrives_token_by_token(front: Front, wire: Wire, path: str) -> None:
    """Each token is with the client before decode computes the next one."""
    decode = (await front.machine.pair())[1]
    decode.faults.hold("schedule", after=1)
    wire.post(path, {**REQUESTS[path], "stream": True})
    status, headers = await wire.head()
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    body = b""
    for tokens in range(1, 8):
        await soon(decode.wait_until(lambda state: state["held_at"] == "schedule"))
        while body.count(b'"delta"' if path != PATH else b'"text"') < tokens:
            body += await wire.chunk()
        decode.faults.step()
    decode.faults.release()
    while chunk := await wire.chunk():
        body += chunk
    assert text_of_events(events(body)) == RIGHT[path]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_every_header_of_an_answer_passes(front: Front, http: aiohttp.ClientSession, stream: bool) -> None:
    await front.machine.pair()
    found = []
    for url in (front.direct, front.machine.proxy.url):
        async with http.post(url + PATH, json={**ASK, "stream": stream}, headers={"X-Request-Id": "mine"}) as answer:
            assert answer.status == 200 and await answer.read()
            found.append({name.lower(): value for name, value in answer.headers.items()})
    direct, behind = found
    # nginx keeps it to itself.
    assert direct.pop("x-accel-buffering", "no") == behind.pop("x-accel-buffering", "no") == "no"
    for name in direct.keys() - _HOP_BY_HOP - {"server", "date"}:
        assert behind[name] == direct[name], name
    assert behind["x-request-id"] == "mine"


@pytest.mark.parametrize("own", [{}, {"X-Request-Id": "mine-1"}], ids=["a new one", "the client's"])
async def test_the_request_id_is_in_every_log(front: Front, tmp_path: Path, own: dict[str, str]) -> None:
    prefill, _ = await front.machine.pair()
    _, headers, _ = await front.machine.post(PATH, ASK, **own)
    found = headers["X-Request-Id"]
    assert found == own.get("X-Request-Id", found)
    await front.machine.proxy.until_idle()
    await front.machine.proxy.stop()
    [line] = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
    assert line["request_id"] == found and line["client_id"] == own.get("X-Request-Id")
    while found not in front.log.read_text():
        await asyncio.sleep(0.01)
    assert len(prefill.received(PATH)) == 1


@pytest.mark.settings(keys=True)
async def test_headers_of_limits_and_of_retries_pass(front: Front) -> None:
    await front.machine.pair()
    key = bearer("alice")
    status, headers, _ = await front.machine.post(PATH, ASK, **key)
    assert status == 200 and headers["x-ratelimit-limit-requests"] == "1"
    assert {"x-ratelimit-remaining-requests", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"} <= {
        name.lower() for name in headers
    }
    status, headers, raw = await front.machine.send(PATH, ASK, **key)
    check_error(status, headers, raw, 429, "rate_limit_exceeded")
    assert 1 <= int(headers["Retry-After"]) <= 60


@pytest.mark.settings(api_key="sesame")
@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key"])
async def test_keys_are_not_logged(front: Front, header: str) -> None:
    await front.machine.pair()
    key = "Bearer sesame" if header == "Authorization" else "sesame"
    status, headers, _ = await front.machine.post(PATH, ASK, **{header: key})
    assert status == 200
    while headers["X-Request-Id"] not in front.log.read_text():
        await asyncio.sleep(0.01)
    assert "sesame" not in front.log.read_text()


async def test_errors_pass_with_their_headers(front: Front) -> None:
    status, headers, raw = await front.machine.send(PATH, ASK)
    check_error(status, headers, raw, 503, "no_pair")
    assert headers["X-Should-Retry"] == "true" and int(headers["Retry-After"]) >= 1
    await front.machine.pair()
    status, headers, raw = await front.machine.send("/v1/embeddings", {"model": "sim-model", "input": "x"})
    check_error(status, headers, raw, 501, "not_implemented")
    assert headers["X-Should-Retry"] == "false" and "Retry-After" not in headers
    status, headers, raw = await front.machine.send(PATH, {**ASK, "use_beam_search": True})
    check_error(status, headers, raw, 400, "unsupported_parameter")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_client_that_leaves_aborts_decode(front: Front, wire: Wire, stream: bool) -> None:
    _, decode = await front.machine.pair(time_per_output_token=0.001)
    wire.post(PATH, {**LONG, "stream": stream})
    if stream:
        assert (await wire.head())[0] == 200 and await wire.chunk()
    await soon(decode.wait_until(lambda state: state["running"] == 1))
    wire.leave()
    await soon(decode.wait_until(lambda state: state["aborted"] == 1))
    await soon(front.machine.proxy.until_idle())
    assert front.machine.proxy.services.stats.outcomes == {"client_left": 1}


async def test_a_cut_stream_is_seen_as_cut(front: Front, http: aiohttp.ClientSession) -> None:
    _, decode = await front.machine.pair()
    decode.faults.cut_stream_after(3)
    async with http.post(front.machine.proxy.url + PATH, json={**ASK, "stream": True}) as answer:
        body = b""
        try:
            async for chunk in answer.content.iter_any():
                body += chunk
            seen = False
        except aiohttp.ClientPayloadError:
            seen = True
    assert b"data: " in body and b"[DONE]" not in body
    assert seen is front.reports_cuts


@pytest.mark.settings(stream_error_event=True)
async def test_an_error_event_reports_a_cut_behind_every_server(front: Front) -> None:
    _, decode = await front.machine.pair()
    decode.faults.cut_stream_after(3)
    async with openai.AsyncOpenAI(base_url=front.machine.proxy.url + "/v1", api_key="none", max_retries=0) as client:
        stream = await client.completions.create(**ASK, stream=True)
        text = ""
        with pytest.raises(openai.APIError, match="closed the connection"):
            async for chunk in stream:
                text += chunk.choices[0].text
    assert text and RIGHT[PATH].startswith(text)


async def test_connections_to_the_proxy_are_kept(front: Front) -> None:
    machine = front.machine
    await machine.pair()
    await machine.check_right()
    first = set(machine.proxy.server.server_state.connections)
    for path in [*REQUESTS] * 2:
        await machine.check_right(path)
        await machine.stream(path, REQUESTS[path])
    last = machine.proxy.server.server_state.connections
    assert first & last, "the first one is still open"
    assert len(last - first) <= 1, "another one only where a request came before the last one's end was noticed"


async def test_a_large_body(front: Front, wire: Wire) -> None:
    await front.machine.pair()
    wire.post(PATH, {**ASK, "padding": " " * (8 << 20)})
    status, _, raw = await wire.answer()
    assert status == 200 and text_of(json.loads(raw)) == RIGHT[PATH]


@pytest.mark.settings(max_body_bytes=1000)
async def test_a_body_that_the_proxy_refuses(front: Front, wire: Wire, dial) -> None:
    for size in (2000, 8 << 20):
        wire.post(PATH, {**ASK, "padding": " " * size})
        check_error(*await wire.answer(), 413, "request_too_large")
        wire = await dial(front.machine.proxy.url)


@pytest.mark.settings(api_key="sesame")
async def test_livez_needs_no_engine_and_no_key(front: Front, http: aiohttp.ClientSession) -> None:
    async with http.get(front.machine.proxy.url + "/livez") as answer:
        assert answer.status == 200
