"""Several keys: who may call what, how much of it, and what is counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from disagg_proxy.config.keys_file import digest
from disagg_proxy.config.reload import ReloadError
from disagg_proxy.server.asgi.auth import MONITORING_PATHS
from disagg_proxy.top import follow
from tests.conftest import Wire, running_proxy, soon
from tests.simulated import CHAT, REQUESTS, Machine, check_error, events

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
IDS = {"model": "sim-model", "prompt": list(range(1, 31)), "max_tokens": 8}
"""A prompt of 30 tokens, whose number is known before."""

NAMES = ("alice", "bob")


def key_of(name: str) -> str:
    return f"sk-{name}-0123456789"


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key_of(name)}"}


def table(name: str, *fields: str) -> str:
    return "\n".join(
        ["[[keys]]", f'name = "{name}"', f'hash = "sha256:{digest(key_of(name).encode()).hex()}"', *fields, ""]
    )


@pytest.fixture
async def keyed(http, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Machine]:
    """A proxy with keys for alice, whose fields the mark ``settings(alice=[...])`` gives, and bob."""
    mark = request.node.get_closest_marker("settings")
    settings: dict[str, Any] = dict(mark.kwargs) if mark else {}
    file = tmp_path / "keys.toml"
    file.write_text(table("alice", *settings.pop("alice", ())) + table("bob"))
    log = tmp_path / "access.log"
    async with (
        running_proxy(api_keys_file=str(file), access_log=str(log), **settings) as proxy,
        AsyncExitStack() as stack,
    ):
        machine = Machine(proxy, stack, http)
        await machine.pair()
        yield machine


@pytest.fixture(params=["fast path", "quart"])
def send(request: pytest.FixtureRequest, keyed: Machine) -> Callable[..., Any]:
    """``machine.send`` on either way into the proxy."""

    async def call(path: str, body: dict[str, Any], **headers: str) -> tuple[int, Any, bytes]:
        raw = json.dumps(body).encode()

        async def chunks() -> AsyncIterator[bytes]:
            yield raw

        data = raw if request.param == "fast path" else chunks()
        headers = {"Content-Type": "application/json", **headers}
        async with keyed.http.post(keyed.proxy.url + path, data=data, headers=headers) as answer:
            return answer.status, answer.headers, await answer.read()

    return call


async def metrics(machine: Machine, name: str) -> dict[str, float]:
    """Samples of one metric: its labels as text."""
    async with machine.http.get(machine.proxy.url + "/metrics", headers={"Authorization": "Bearer operator"}) as answer:
        lines = (await answer.text()).splitlines()
    found = [line.removeprefix(f"disagg_proxy_{name}") for line in lines if line.startswith(f"disagg_proxy_{name}{{")]
    return {labels: float(value) for labels, value in (line.rsplit(" ", 1) for line in found)}


@pytest.mark.parametrize("path", REQUESTS)
async def test_each_key_opens_the_api_in_both_spellings(keyed, send, path: str) -> None:
    for name in NAMES:
        for headers in (bearer(name), {"X-Api-Key": key_of(name)}):
            status, got, raw = await send(path, REQUESTS[path], **headers)
            assert status == 200, raw
            assert not any("ratelimit" in header.lower() for header in got), "there is no limit"
    wrong = ("", "alice", key_of("alice")[:-1], key_of("alice") + "x", digest(key_of("bob").encode()).hex())
    for one in wrong:
        for headers in ({"Authorization": f"Bearer {one}"}, {"X-Api-Key": one}):
            message = check_error(*await send(path, REQUESTS[path], **headers), 401, "invalid_api_key")
            assert not any(name in message for name in NAMES)
    for engine in keyed.engines:
        assert not any(key_of(name) in str(r.headers) for r in engine.received(path) for name in NAMES)


@pytest.mark.settings(api_key="operator")
async def test_the_single_key_stays_valid_and_is_counted_by_its_name(keyed, send) -> None:
    status, _, raw = await send(PATH, ASK, Authorization="Bearer operator")
    assert status == 200, raw
    await send(PATH, ASK, **bearer("bob"))
    await keyed.proxy.until_idle()
    assert await metrics(keyed, "key_requests_total") == {
        '{key="alice",outcome="ok"}': 0, '{key="bob",outcome="ok"}': 1, '{key="API_KEY",outcome="ok"}': 1,
    }  # fmt: skip


@pytest.mark.settings(api_key="operator", alice=["monitoring = true"])
async def test_what_reports_on_all_clients_needs_a_key_that_monitors(keyed) -> None:
    rules = {rule.rule for rule in keyed.proxy.server.config.app.url_map.iter_rules()}
    assert rules >= MONITORING_PATHS, "each is a route"
    for path in ("/stats", "/metrics", "/stats/", "/metrics/"):
        async with keyed.http.get(keyed.proxy.url + path, headers=bearer("bob")) as answer:
            message = check_error(answer.status, answer.headers, await answer.read(), 403, "permission_denied")
            assert "monitoring = true" in message
        for headers in (bearer("alice"), {"Authorization": "Bearer operator"}):
            async with keyed.http.get(keyed.proxy.url + path, headers=headers) as answer:
                assert answer.status == 200
    async with keyed.http.get(keyed.proxy.url + "/dashboard/events", headers=bearer("bob")) as answer:
        assert answer.status == 403
    for path in ("/health", "/livez", "/"):
        async with keyed.http.get(keyed.proxy.url + path) as answer:
            assert answer.status == 200


@pytest.mark.settings(alice=["requests_per_minute = 2"], api_key="operator")
async def test_a_limit_of_requests(keyed, send) -> None:
    for left in (1, 0):
        status, headers, raw = await send(PATH, ASK, **bearer("alice"))
        assert status == 200, raw
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == str(left)
        assert "x-ratelimit-limit-tokens" not in headers
    status, headers, raw = await send(PATH, ASK, **bearer("alice"))
    check_error(status, headers, raw, 429, "rate_limit_exceeded")
    assert json.loads(raw)["error"]["type"] == "requests"
    assert 1 <= int(headers["Retry-After"]) <= 30 and headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    assert headers.get("X-Should-Retry") != "false", "waiting helps"
    assert (await send(PATH, ASK, **bearer("bob")))[0] == 200, "it is alice's limit"
    await keyed.proxy.until_idle()
    assert await metrics(keyed, "key_refusals_total") == {
        f'{{key="{name}",limit="{limit}"}}': float((name, limit) == ("alice", "requests"))
        for name in ("alice", "bob", "API_KEY")
        for limit in ("requests", "tokens")
    }
    stats = keyed.proxy.services.stats
    assert stats.turned_away == 0 and stats.outcomes["client_error"] == 1


@pytest.mark.settings(alice=["requests_per_minute = 1"])
async def test_the_official_clients_understand_the_refusal(keyed) -> None:
    url = keyed.proxy.url
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key=key_of("alice"), max_retries=0) as client:
        ask: Any = {"model": "sim-model", "messages": CHAT, "max_tokens": 2}
        raw = await client.chat.completions.with_raw_response.create(**ask)
        assert raw.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError, match="limit of 1 requests a minute") as caught:
            await client.chat.completions.create(**ask)
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
    async with anthropic.AsyncAnthropic(base_url=url, api_key=key_of("alice"), max_retries=0) as other:
        with pytest.raises(anthropic.RateLimitError) as refused:
            await other.messages.create(**ask)
        assert refused.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index]
        headers = refused.value.response.headers
        assert headers["anthropic-ratelimit-requests-limit"] == "1"
        assert headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert headers["anthropic-ratelimit-requests-reset"].endswith("Z")
        assert not any(name.startswith("x-ratelimit") for name in headers)


@pytest.mark.settings(alice=["tokens_per_minute = 100000"])
@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_estimated_at_first_and_corrected_by_usage(keyed, send, stream: bool) -> None:
    """A stream without usage costs its events, so that nobody evades the limit by leaving usage out."""
    services = keyed.proxy.services
    now = services.stats.clock()
    services.stats.clock = lambda: now
    status, headers, raw = await send(PATH, {**IDS, "stream": stream}, **bearer("alice"))
    assert status == 200, raw
    assert headers["x-ratelimit-limit-tokens"] == "100000" and headers["x-ratelimit-remaining-tokens"] == "99970"
    await keyed.proxy.until_idle()
    alice = services.keys.find(key_of("alice").encode())
    used = alice.tokens.used(now)
    generated = sum(bool(e["choices"][0]["text"]) for e in events(raw)) if stream else 8
    assert used == pytest.approx(30 + generated, abs=2 if stream else 1e-6) and generated >= 7


@pytest.mark.settings(alice=["tokens_per_minute = 50"])
async def test_a_limit_of_tokens(keyed, send) -> None:
    assert (await send(PATH, IDS, **bearer("alice")))[0] == 200
    status, headers, raw = await send(PATH, IDS, **bearer("alice"))
    check_error(status, headers, raw, 429, "rate_limit_exceeded")
    assert json.loads(raw)["error"]["type"] == "tokens"
    small = {**IDS, "prompt": [1], "max_tokens": 1}
    assert (await send(PATH, small, **bearer("alice")))[0] == 200, "it fits beside the other one"


@pytest.mark.settings(alice=["tokens_per_minute = 1000"])
async def test_a_request_that_no_engine_gets_costs_no_tokens(keyed, send) -> None:
    status, _, raw = await send(PATH, {**IDS, "model": "nobody"}, **bearer("alice"))
    check_error(status, {"Content-Type": "application/json"}, raw, 404, "model_not_found")
    await keyed.proxy.until_idle()
    services = keyed.proxy.services
    assert services.keys.find(key_of("alice").encode()).tokens.used(services.stats.clock()) == 0


@pytest.mark.settings(alice=['models = ["other-model"]'])
async def test_models_that_a_key_may_not_use_do_not_exist_for_it(keyed, send) -> None:
    there = "Models that exist: none yet."
    for name in ("sim-model", "nowhere", "other-model"):
        status, headers, raw = await send(PATH, {**ASK, "model": name}, **bearer("alice"))
        message = check_error(status, headers, raw, 404, "model_not_found")
        assert message == f"The model {name!r} does not exist here. {there}", "the same for all"
    body = {name: value for name, value in ASK.items() if name != "model"}
    check_error(*await send(PATH, body, **bearer("alice")), 400, "invalid_request")
    for path in ("/tokenize", "/v1/embeddings"):
        status, headers, raw = await keyed.send(path, {"model": "sim-model", "prompt": "x"}, **bearer("alice"))
        assert status in (404, 501) and b"other" not in raw.replace(b"another", b"")
    for name, shown in (("alice", []), ("bob", ["sim-model"])):
        async with keyed.http.get(keyed.proxy.url + "/v1/models", headers=bearer(name)) as answer:
            assert [card["id"] for card in (await answer.json())["data"]] == shown
        async with keyed.http.get(keyed.proxy.url + "/v1/models/sim-model", headers=bearer(name)) as answer:
            assert answer.status == (200 if shown else 404)
            assert shown or there in (await answer.json())["error"]["message"]
    assert not any(engine.received(PATH) for engine in keyed.engines)


@pytest.mark.settings(alice=["requests_per_minute = 2", 'models = ["sim-model"]'])
async def test_routes_of_one_engine_count_as_requests(keyed) -> None:
    ask = {"model": "sim-model", "prompt": "x"}
    for left in ("1", "0"):
        status, headers, raw = await keyed.send("/tokenize", ask, **bearer("alice"))
        assert (status, headers["x-ratelimit-remaining-requests"]) == (200, left), raw
    check_error(*await keyed.send("/tokenize", ask, **bearer("alice")), 429, "rate_limit_exceeded")
    async with keyed.http.get(keyed.proxy.url + "/v1/models", headers=bearer("alice")) as answer:
        assert answer.status == 200, "what no engine computes is not limited"


async def test_metrics_and_access_log_have_the_name_and_never_the_key(keyed, tmp_path: Path) -> None:
    for name in NAMES:
        await keyed.send(PATH, ASK, **bearer(name))
    await keyed.send(PATH, {**ASK, "prompt": 1}, **bearer("bob"))
    await keyed.send(PATH, ASK, Authorization="Bearer nobody")
    await keyed.proxy.until_idle()
    stats = keyed.proxy.services.stats
    assert dict(stats.key_requests) == {"alice\tok": 1, "bob\tok": 1, "bob\tclient_error": 1}
    assert stats.key_tokens["alice\tprompt"] > 0 and stats.key_tokens["alice\tgeneration"] == 8
    await keyed.proxy.stop()
    lines = [json.loads(line) for line in (tmp_path / "access.log").read_bytes().splitlines()]
    assert [(one["key"], one["status"]) for one in lines] == [("alice", 200), ("bob", 200), ("bob", 400)]
    assert not any(key_of(name) in str(lines) for name in NAMES)


async def test_a_removed_key_opens_nothing_even_on_a_kept_connection(keyed, dial, tmp_path: Path) -> None:
    """The head of its next request is in the cache."""
    wire: Wire = await dial(keyed.proxy.url)
    header = f"Authorization: Bearer {key_of('alice')}"
    for _ in range(3):
        wire.post(PATH, ASK, header)
        assert (await wire.answer())[0] == 200
    file = tmp_path / "keys.toml"
    file.write_text("[[keys]\n")
    with pytest.raises(ReloadError):
        keyed.proxy.services.keys.reload()
    wire.post(PATH, ASK, header)
    assert (await wire.answer())[0] == 200, "a bad file changes nothing"
    file.write_text(table("bob"))
    assert keyed.proxy.services.keys.reload() == "API_KEYS_FILE: removed alice"
    wire.post(PATH, ASK, header)
    check_error(*await wire.answer(), 401, "invalid_api_key")


@pytest.mark.settings(alice=["priority = 9"], decode_max_in_flight=1)
async def test_priority_orders_the_queue(keyed, tmp_path: Path) -> None:
    holding = await keyed.http.post(
        keyed.proxy.url + PATH, json={**ASK, "stream": True, "max_tokens": 100}, headers=bearer("bob")
    )
    queue, asked = keyed.proxy.services.admission_queue, []
    for count, name in enumerate(("bob", "bob", "alice"), 1):
        asked.append(asyncio.create_task(keyed.send(PATH, {**ASK, "max_tokens": 1}, **bearer(name))))
        while queue.waiting < count:
            await asyncio.sleep(0)
    holding.close()
    assert [(await one)[0] for one in asked] == [200, 200, 200]
    await keyed.proxy.stop()
    lines = [json.loads(line) for line in (tmp_path / "access.log").read_bytes().splitlines()]
    assert [one["key"] for one in lines] == ["bob", "alice", "bob", "bob"]


async def test_top_says_what_a_key_of_the_api_lacks(keyed) -> None:
    with pytest.raises(follow.WrongKey, match="it needs monitoring = true in API_KEYS_FILE"):
        await soon(anext(follow.views(keyed.proxy.url, key_of("bob"))))
