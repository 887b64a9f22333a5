"""Who may call: the API key, and the origins that browsers may call from."""

from __future__ import annotations

import hmac

import pytest

from tests.simulated import REQUESTS

KEY = "sk-the-right-one"
with_key = pytest.mark.settings(api_key=KEY)

LOCKED = [
    ("GET", "/stats"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/sim-model"),
    ("GET", "/nope"),
    ("GET", "/health/x"),
    ("GET", "/livez/x"),
    ("POST", "/tokenize"),
    ("POST", "/start_profile"),
    ("POST", "/v1/embeddings"),
    *(("POST", path) for path in REQUESTS),
]

WRONG = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": f"Bearer {KEY} x"},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": KEY},
    {"Authorization": "Bearer schlüssel"},
    {"X-Api-Key": f"{KEY}x"},
]


@with_key
async def test_everything_but_probes_and_the_page_needs_the_key(machine, pair) -> None:
    for method, path in LOCKED:
        async with machine.http.request(method, machine.proxy.url + path, json=REQUESTS.get(path, {})) as answer:
            assert (answer.status, answer.content_type) == (401, "application/json"), path
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            error = (await answer.json())["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    for path in ("/health", "/livez", "/", "/dashboard"):
        async with machine.http.get(machine.proxy.url + path) as answer:
            assert answer.status == 200, path
    assert not any(engine.received(path) for engine in pair for path in REQUESTS)


@with_key
@pytest.mark.parametrize("path", REQUESTS)
async def test_the_key_must_be_right_to_the_last_character(machine, pair, path) -> None:
    for headers in WRONG:
        assert (await machine.send(path, REQUESTS[path], **headers))[0] == 401, headers
    for scheme in ("Bearer", "bearer"):
        assert (await machine.send(path, REQUESTS[path], Authorization=f"{scheme} {KEY}"))[0] == 200


@with_key
async def test_every_route_takes_the_key_as_anthropics_clients_send_it(machine, pair) -> None:
    """One base URL serves models, token counts and messages: ``anthropic.Anthropic(api_key=...)`` sends X-Api-Key."""
    for method, path in LOCKED:
        for headers, refused in (({"X-Api-Key": KEY}, False), ({"X-Api-Key": f"{KEY}x"}, True)):
            async with machine.http.request(
                method, machine.proxy.url + path, json=REQUESTS.get(path, {}), headers=headers
            ) as answer:
                assert (answer.status == 401) is refused, path
    wrong = {"Authorization": "Bearer other", "X-Api-Key": KEY}
    assert (await machine.send("/v1/messages", REQUESTS["/v1/messages"], **wrong))[0] == 401


@with_key
async def test_the_key_is_compared_in_constant_time(machine, pair, monkeypatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    await machine.send("/tokenize", {}, Authorization="Bearer guess")
    assert (b"guess", KEY.encode()) in compared


@pytest.mark.settings(api_key=KEY, engine_api_key="engine-key")
async def test_the_clients_key_is_not_the_engines(machine) -> None:
    pair = await machine.pair(api_key="engine-key")
    assert (await machine.send("/v1/completions", REQUESTS["/v1/completions"], Authorization=f"Bearer {KEY}"))[0] == 200
    for engine in pair:
        assert KEY not in str(engine.received("/v1/completions")[0].headers)


@pytest.mark.settings(engine_api_key="engine-key")
async def test_the_clients_key_for_messages_does_not_reach_the_engines_either(machine) -> None:
    pair = await machine.pair(api_key="engine-key")
    body = REQUESTS["/v1/messages"]
    assert (await machine.send("/v1/messages", body, **{"X-Api-Key": KEY}))[0] == 200
    for engine in pair:
        assert KEY not in str(engine.received("/v1/messages")[0].headers)


async def test_without_a_key_all_may_call(machine, pair) -> None:
    for headers in ({}, {"Authorization": "Bearer anything"}):
        assert (await machine.send("/v1/completions", REQUESTS["/v1/completions"], **headers))[0] == 200


ORIGIN = "https://chat.example"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-custom",
}


async def preflight(machine, path: str, **headers: str):
    async with machine.http.options(machine.proxy.url + path, headers={**PREFLIGHT, **headers}) as answer:
        return answer.status, answer.headers


@pytest.mark.settings(cors_origins=(ORIGIN, "https://other.example"), api_key=KEY)
async def test_a_browser_of_an_allowed_origin_may_call(machine, pair) -> None:
    for path in (*REQUESTS, "/v1/models", "/tokenize"):
        status, headers = await preflight(machine, path)
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, ORIGIN)
        assert "POST" in headers["Access-Control-Allow-Methods"] or "*" in headers["Access-Control-Allow-Methods"]
        assert {"authorization", "content-type"} <= set(headers["Access-Control-Allow-Headers"].lower().split(", "))
    auth = {"Authorization": f"Bearer {KEY}", "Origin": ORIGIN}
    for stream in (False, True):
        body = {**REQUESTS["/v1/completions"], "stream": stream}
        status, headers, _ = await machine.send("/v1/completions", body, **auth)
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, ORIGIN)
        assert "x-request-id" in headers["Access-Control-Expose-Headers"].lower()


@pytest.mark.settings(cors_origins=(ORIGIN,), api_key=KEY)
async def test_errors_can_be_read_by_the_browser_too(machine, pair) -> None:
    status, headers, _ = await machine.send("/v1/completions", REQUESTS["/v1/completions"], Origin=ORIGIN)
    assert (status, headers["Access-Control-Allow-Origin"]) == (401, ORIGIN)
    auth = {"Authorization": f"Bearer {KEY}", "Origin": ORIGIN}
    for path, body, expected in (("/nope", b"{}", 404), ("/v1/completions", b"no", 400)):
        status, headers, _ = await machine.send(path, body, **auth)
        assert (status, headers["Access-Control-Allow-Origin"]) == (expected, ORIGIN)


@pytest.mark.settings(cors_origins=(ORIGIN,))
async def test_another_origin_gets_no_permission(machine, pair) -> None:
    _, headers = await preflight(machine, "/v1/completions", Origin="https://evil.example")
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.settings(cors_origins=("*",))
async def test_a_star_allows_every_origin(machine, pair) -> None:
    status, headers = await preflight(machine, "/v1/completions", Origin="https://any.example")
    assert status == 200 and headers["Access-Control-Allow-Origin"] in ("*", "https://any.example")


async def test_no_origin_is_allowed_by_default(machine, pair) -> None:
    _, headers = await preflight(machine, "/v1/completions")
    assert not any(name.startswith("Access-Control") for name in headers)


PERMITTING = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Credentials": "true",
    "Access-Control-Expose-Headers": "X-Engine",
}


@pytest.mark.parametrize(
    "permitted",
    [
        pytest.param((), marks=pytest.mark.settings(cors_origins=())),
        pytest.param((), marks=pytest.mark.settings(cors_origins=("https://other.example",))),
        pytest.param((ORIGIN,), marks=pytest.mark.settings(cors_origins=(ORIGIN,))),
    ],
    ids=["off", "another origin", "this origin"],
)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/version"), ("POST", "/tokenize"), *(("POST", p) for p in REQUESTS)]
)
async def test_what_an_engine_permits_is_not_passed_on(machine, pair, method: str, path: str, permitted) -> None:
    for engine in pair:
        engine.faults.fail_next(400, b"{}", PERMITTING, path=path)
    body = REQUESTS.get(path, {})
    async with machine.http.request(method, machine.proxy.url + path, json=body, headers={"Origin": ORIGIN}) as answer:
        assert answer.status == 400
        assert answer.headers.getall("Access-Control-Allow-Origin", []) == list(permitted)
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert "X-Engine" not in answer.headers.get("Access-Control-Expose-Headers", "")
    received = [request for engine in pair for request in engine.received(path)]
    assert received and not any("Origin" in request.headers for request in received)
